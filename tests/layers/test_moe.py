from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from genfound.layers.expert_kernels import KERNELS, Kernel, choose_kernel
from genfound.layers.moe import Experts, MixtureOfExperts, Router, Routing, balance_loss, expert_load

WIDTH, HIDDEN = 16, 24
LENGTHS = {
    "all": [3, 4, 2, 5],
    "first_empty": [0, 6, 1, 4],
    "last_empty": [7, 1, 3, 0],
    "one_takes_all": [0, 0, 9, 0],
    "one_each": [1, 1, 1, 1],
}


def inputs(lengths: list[int], device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Sorted rows, their ends, the two stacks of weights, and a gradient of the output."""
    generator = torch.Generator().manual_seed(7)
    count = len(lengths)
    shapes = ((sum(lengths), WIDTH), (count, 2 * HIDDEN, WIDTH), (count, WIDTH, HIDDEN), (sum(lengths), WIDTH))
    scales = (1.0, WIDTH**-0.5, HIDDEN**-0.5, 1.0)
    drawn = (torch.randn(s, generator=generator) * scale for s, scale in zip(shapes, scales, strict=True))
    rows, gate_up, down, upstream = (a.to(device, dtype) for a in drawn)
    ends = torch.tensor(lengths, device=device).cumsum(0, dtype=torch.int32)
    return rows.requires_grad_(), ends, gate_up.requires_grad_(), down.requires_grad_(), upstream


def plain_loop(rows: Tensor, ends: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    out, begin = [], 0
    for expert, end in enumerate(ends.tolist()):
        x = rows[begin:end]
        gate, up = x @ gate_up[expert, :HIDDEN].T, x @ gate_up[expert, HIDDEN:].T
        out.append(gate / (1 + torch.exp(-gate)) * up @ down[expert].T)
        begin = end
    return torch.cat(out)


def output_and_gradients(form: Kernel, rows: Tensor, ends: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    gate_up, down, upstream = rest
    out = form(rows, ends, gate_up, down)
    return out.detach(), *torch.autograd.grad(out, (rows, gate_up, down), upstream)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("form", KERNELS)
def test_every_form_is_a_loop_over_experts(form: str, lengths: list[int]) -> None:
    ours = output_and_gradients(KERNELS[form], *inputs(lengths))
    expected = output_and_gradients(plain_loop, *inputs(lengths))
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-6, rtol=1e-5)
    for gradient in ours[2:]:
        for expert, rows in enumerate(lengths):
            assert (gradient[expert] == 0).all() == (rows == 0)


@pytest.mark.parametrize("form", KERNELS)
def test_a_form_without_gradients_gives_the_same_output(form: str) -> None:
    rows, ends, gate_up, down, _ = inputs([3, 0, 5])
    with_gradient = KERNELS[form](rows, ends, gate_up, down)
    with torch.no_grad():
        assert torch.equal(KERNELS[form](rows, ends, gate_up, down), with_gradient)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[40, 0, 3, 21], [0, 64, 0, 0]])
@pytest.mark.parametrize("form", KERNELS)
def test_every_form_on_the_graphics_card(form: str, lengths: list[int]) -> None:
    ours = output_and_gradients(KERNELS[form], *inputs(lengths, "cuda", torch.bfloat16))
    expected = output_and_gradients(plain_loop, *inputs(lengths))
    for mine, theirs in zip(ours, expected, strict=True):
        error = (mine.float().cpu() - theirs).norm() / theirs.norm()
        assert error < 0.02
    for gradient in ours[2:]:
        assert all((gradient[expert] == 0).all() for expert, rows in enumerate(lengths) if rows == 0)


def test_the_form_follows_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_kernel("cpu", torch.float32, 64, 64) == "slices"
    assert choose_kernel("cpu", torch.bfloat16, 64, 64) == "slices"
    for capability, fastest in (((9, 0), "grouped"), ((8, 0), "slices"), ((10, 0), "grouped")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda it=capability: it)
        assert choose_kernel("cuda", torch.bfloat16, 64, 64) == fastest
    assert choose_kernel("cuda", torch.float32, 64, 64) == "slices"
    assert choose_kernel("cuda", torch.bfloat16, 60, 64) == "slices"


def test_all_forms_count_the_same_operations() -> None:
    rows, ends, gate_up, down, upstream = inputs([3, 0, 5, 4])
    forward = 6 * len(rows) * WIDTH * HIDDEN
    for name, form in KERNELS.items():
        with FlopCounterMode(display=False) as counter:
            out = form(rows, ends, gate_up, down)
            assert counter.get_total_flops() == forward, name
            out.backward(upstream)
            assert counter.get_total_flops() == 3 * forward, name
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        KERNELS["slices"](*(a.detach().to("meta") for a in (rows, ends, gate_up, down)))
    assert counter.get_total_flops() == forward


def mixture(**options: object) -> MixtureOfExperts:
    defaults = {
        "width": WIDTH, "hidden": HIDDEN, "experts": 4, "top_k": 2, "normalise": False, "shared_hidden": 8,
        "eval_gradients": True,
    }  # fmt: skip
    torch.manual_seed(1)
    return MixtureOfExperts(**{**defaults, **options})  # type: ignore[arg-type]


def tokens(images: int = 2, count: int = 9) -> Tensor:
    return torch.randn(images, count, WIDTH, generator=torch.Generator().manual_seed(5))


def dense_sum(module: MixtureOfExperts, x: Tensor) -> Tensor:
    """All experts on all tokens, weighted by zero where they are not chosen."""
    scores = (x @ module.gate.weight.T).softmax(-1)
    kth = scores.sort(dim=-1, descending=True).values[..., module.gate.top_k - 1 : module.gate.top_k]
    weights = torch.where(scores >= kth, scores, 0)
    if module.gate.normalise:
        weights = weights / weights.sum(-1, keepdim=True)
    gate, up = torch.einsum("bnd,ehd->benh", x, module.experts.gate_up).chunk(2, dim=-1)
    out = torch.einsum("benh,edh->bend", nn.functional.silu(gate) * up, module.experts.down)
    return torch.einsum("bne,bend->bnd", weights, out)


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_the_mixture_is_a_weighted_sum(top_k: int, normalise: bool) -> None:
    module, x = mixture(top_k=top_k, normalise=normalise, shared_hidden=0), tokens()
    torch.testing.assert_close(module(x)[0], dense_sum(module, x), atol=1e-6, rtol=1e-5)
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(6))
    ours = torch.autograd.grad(module(x)[0], list(module.parameters()), upstream)
    expected = torch.autograd.grad(dense_sum(module, x), list(module.parameters()), upstream)
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-6, rtol=1e-4)


def test_the_shared_expert_is_added() -> None:
    module, x = mixture(), tokens()
    assert module.shared_experts is not None
    torch.testing.assert_close(module(x)[0], dense_sum(module, x) + module.shared_experts(x), atol=1e-6, rtol=1e-5)


def test_an_expert_without_tokens_gets_gradients_of_zero() -> None:
    module = mixture(top_k=1)
    nn.init.zeros_(module.gate.weight)
    module.gate.weight.data[2, 0] = 50
    out, routing = module(tokens().abs())
    assert routing.counts.sum(0).tolist() == [0, 0, 18, 0]
    out.sum().backward()
    for weight in module.experts.parameters():
        assert weight.grad is not None
        assert [bool((g != 0).any()) for g in weight.grad] == [False, False, True, False]


def test_evaluation_can_stop_gradients_of_routed_experts() -> None:
    module, x = mixture(eval_gradients=False), tokens().requires_grad_()
    (trained,) = torch.autograd.grad(module.train()(x)[0].sum(), x)
    out, _ = module.eval()(x)
    assert module.shared_experts is not None
    (evaluated,) = torch.autograd.grad(out.sum(), x)
    (shared,) = torch.autograd.grad(module.shared_experts(x).sum(), x)
    assert torch.equal(evaluated, shared)
    assert (trained - shared).abs().max() > 1e-3
    (kept,) = torch.autograd.grad(mixture().eval()(x)[0].sum(), x)
    assert torch.equal(kept, trained)


def test_weights_of_a_token_sum_to_one_if_asked() -> None:
    x = tokens()
    for top_k, normalise, total in ((2, True, 1.0), (4, False, 1.0)):
        weights = Router(WIDTH, 4, top_k, normalise)(x).weights
        torch.testing.assert_close(weights.sum(-1), torch.full((2, 9), total))
    assert (Router(WIDTH, 4, 1, normalise=True)(x).weights < 1).all()
    assert (Router(WIDTH, 4, 2, normalise=False)(x).weights.sum(-1) < 1).all()


def test_the_last_bit_of_a_weight_decides_a_tie_of_two_experts() -> None:
    mixture = MixtureOfExperts(8, 8, 3, 1, False, 0, eval_gradients=True)
    x = torch.rand(1, 1, 8)
    with torch.no_grad():
        mixture.gate.weight[:] = mixture.gate.weight[0].abs() + 1  # all scores are equal
        mixture.gate.weight[2] -= 1
        before = [mixture(x)[0], mixture.gate(x).scores]
        chosen = int(mixture.gate(x).choices)
        row = mixture.gate.weight[1 - chosen]
        row.copy_(torch.nextafter(row, torch.tensor(torch.inf)))
        after = [mixture(x)[0], mixture.gate(x).scores]
    assert int(mixture.gate(x).choices) == 1 - chosen
    torch.testing.assert_close(after[1], before[1], rtol=1e-5, atol=0)
    assert (after[0] - before[0]).norm() > 0.1 * before[0].norm()  # the output is that of another expert


def test_the_router_knows_how_often_each_image_chose_each_expert() -> None:
    routing = Router(WIDTH, 4, 2, False)(tokens(3, 7))
    for image in range(3):
        assert routing.counts[image].tolist() == torch.bincount(routing.choices[image].flatten(), minlength=4).tolist()
    torch.testing.assert_close(expert_load(routing), routing.counts.sum(0) / 42)


@pytest.mark.parametrize("top_k", [0, 5])
def test_more_choices_than_experts_are_refused(top_k: int) -> None:
    with pytest.raises(ValueError, match=rf"model\.top_k={top_k} must lie between 1 and model\.experts=4"):
        Router(WIDTH, 4, top_k, False)


@pytest.mark.parametrize("over", ["tokens", "sequence"])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_a_uniform_router_has_a_balance_loss_of_one(top_k: int, over: str) -> None:
    router = Router(WIDTH, 4, top_k, False)
    nn.init.zeros_(router.weight)
    assert balance_loss(router(tokens()), over).item() == pytest.approx(1.0, abs=1e-6)


def test_a_collapsed_router_has_a_balance_loss_of_the_number_of_experts() -> None:
    router = Router(WIDTH, 4, 1, False)
    nn.init.zeros_(router.weight)
    router.weight.data[1] = 100
    assert balance_loss(router(tokens().abs()), "tokens").item() == pytest.approx(4.0)


def test_images_are_balanced_together_or_each_alone() -> None:
    """Two images that use one expert each are balanced together and collapsed alone."""
    scores = torch.tensor([[[1.0, 0.0]] * 3, [[0.0, 1.0]] * 3], requires_grad=True)
    choices = torch.tensor([[[0]] * 3, [[1]] * 3])
    routing = Routing(scores, choices, torch.ones(2, 3, 1), torch.tensor([[3, 0], [0, 3]]))
    together, alone = balance_loss(routing, "tokens"), balance_loss(routing, "sequence")
    assert (together.item(), alone.item()) == (1.0, 2.0)
    (gradient,) = torch.autograd.grad(alone, scores)
    expected = torch.tensor([[[1.0, 0.0]] * 3, [[0.0, 1.0]] * 3]) * 2 / 2 / 3  # E f / (B N)
    torch.testing.assert_close(gradient, expected)


def test_bf16_autocast_stays_close_and_returns_float32() -> None:
    module, x = mixture(), tokens()
    exact, routing = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, again = module(x)
    assert rounded.dtype == torch.float32
    assert torch.equal(again.scores, routing.scores)
    assert 1e-4 < (rounded - exact).norm() / exact.norm() < 0.02
    rounded.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in module.parameters())


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_equals_eager_without_a_graph_break() -> None:
    module = mixture()
    compiled = torch.compile(lambda x: module(x)[0], fullgraph=True, backend="aot_eager")
    for x in (tokens(), tokens() * 3 + 1):
        expected = module(x)[0]
        assert torch.equal(compiled(x), expected)
        upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(6))
        theirs = torch.autograd.grad(expected, list(module.parameters()), upstream)
        for mine, other in zip(
            torch.autograd.grad(compiled(x), list(module.parameters()), upstream), theirs, strict=True
        ):
            torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-5)


def test_initial_weights_follow_the_published_laws() -> None:
    experts, router = Experts(64, 256, 8), Router(64, 8, 2, False)
    xavier = (6 / (64 + 256)) ** 0.5
    for weight, bound in ((experts.gate_up, xavier), (experts.down, xavier), (router.weight, 64**-0.5)):
        assert 0.98 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
