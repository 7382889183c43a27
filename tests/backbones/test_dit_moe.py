from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from genfound import build
from genfound.backbones.dit import DiT
from genfound.backbones.dit_moe import DiTMoE, RoutingCounts, active_parameters
from genfound.batch import Batch
from genfound.checkpoints.official.dit_moe import from_official, official_options, to_official
from genfound.layouts import Dense
from genfound.modules.dit_moe import upcycle
from genfound.objectives.gaussian import Gaussian
from genfound.rng import Rng
from genfound.runtime import checkpoint_io
from genfound.tokenizers import LatentSpec
from tests.helpers import (
    SAMPLERS,
    assert_equal_gradients,
    composed,
    guidance_of,
    latents,
    linear_flow,
    loss_and_gradients,
    training_module,
)

SMALL: dict[str, Any] = {
    "channels": 4, "num_classes": 10, "patch_size": 2, "width": 32, "depth": 2, "heads": 2, "mlp_ratio": 2,
    "label_drop": 0.1, "activation_checkpointing": False, "qk_norm": "none", "experts": 4, "top_k": 2,
    "norm_topk": False, "shared_experts": 1, "balance": 0.01, "balance_over": "tokens", "eval_gradients": True,
    "unused_half": False, "learn_sigma": True,
}  # fmt: skip
SIZES = {  # parameters without the position table, and those that a token passes
    "s_8e2a": (199_209_248, 71_807_264), "s_16e2a": (369_115_424, 71_844_128), "b_8e2a": (795_664_928, 286_056_992),
    "l_8e2a": (2_823_501_856, 1_011_562_528), "xl_8e2a": (4_167_877_280, 1_492_435_616),
    "g_16e2a": (16_503_370_784, 3_181_212_704),
}  # fmt: skip
TIMES = torch.tensor([0.0, 417.0, 999.0])


def small(**options: Any) -> DiTMoE:
    """A DiT-MoE of two blocks whose weights are all random, also those that start at zero."""
    net = DiTMoE(**{**SMALL, **options})
    generator = torch.Generator().manual_seed(0)
    for name, parameter in net.named_parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
        parameter.data += "norm.weight" in name
    return net


def dense(size: tuple[int, int] = (8, 8), count: int = 3) -> Batch:
    return Dense(2).to_batch(latents([size] * count), torch.arange(count))


@pytest.mark.parametrize("size", SIZES)
def test_published_parameter_counts(size: str) -> None:
    with torch.device("meta"):
        net = build.net(composed(f"model=dit_moe_{size}"), LatentSpec(4, 8), 1000)
    assert isinstance(net, DiTMoE)
    assert (sum(p.numel() for p in net.parameters()), active_parameters(net)) == SIZES[size]
    assert net.final_layer.linear.out_features == 2 * 4 * 2 * 2


def test_the_large_ones_are_flows_with_an_unused_half() -> None:
    flow, gaussian = composed("model=dit_moe_xl_8e2a"), composed("model=dit_moe_s_8e2a")
    assert build.objective(flow).name == "flow" and flow["model"]["qk_norm"] == "layernorm"
    assert build.objective(gaussian).name == "gaussian" and gaussian["model"]["qk_norm"] == "none"
    assert composed("model=dit_moe_b_8e2a")["optimizer"]["images_per_step"] == 1024


@pytest.mark.parametrize(("learn_sigma", "unused", "outputs"), [(True, False, 8), (False, False, 4), (False, True, 4)])
@pytest.mark.parametrize("size", [(8, 8), (4, 12), (2, 2)])
def test_output_has_the_size_of_the_latent(
    size: tuple[int, int], learn_sigma: bool, unused: bool, outputs: int
) -> None:
    net = small(learn_sigma=learn_sigma, unused_half=unused)
    assert net(dense(size), TIMES).shape == (3, outputs, *size)


def test_a_new_network_predicts_zero() -> None:
    assert (DiTMoE(**SMALL)(dense(), TIMES) == 0).all()


def test_an_unused_half_learns_nothing() -> None:
    net, batch = small(learn_sigma=False, unused_half=True), dense()
    used, unused = small(learn_sigma=True)(batch, TIMES).chunk(2, dim=1)
    assert torch.equal(net(batch, TIMES), used)
    assert (unused != used).any()
    linear_flow().loss(net, batch, Rng(0)).total.sum().backward()
    gradient = net.final_layer.linear.weight.grad
    assert gradient is not None
    first, second = gradient.chunk(2)
    assert (first != 0).any(dim=1).all() and (second == 0).all()


@pytest.mark.parametrize("qk_norm", ["none", "layernorm"])
def test_a_batch_gives_what_each_image_alone_gives(qk_norm: str) -> None:
    net, batch = small(qk_norm=qk_norm), dense()
    together = net(batch, TIMES)
    for i in range(3):
        alone = Dense(2).to_batch([batch.x[i]], batch.y[i : i + 1])
        torch.testing.assert_close(net(alone, TIMES[i : i + 1])[0], together[i], atol=1e-4, rtol=1e-5)


def test_normalised_queries_and_keys_have_no_scale() -> None:
    net, batch = small(qk_norm="layernorm"), dense()
    before = net(batch, TIMES)
    for name, parameter in net.named_parameters():
        if "attn.qkv" in name:
            parameter.data[:64] *= 7
    torch.testing.assert_close(net(batch, TIMES), before, atol=1e-4, rtol=1e-4)
    rounded = small(qk_norm="layernorm_half")(batch, TIMES)
    assert 0 < (rounded - before).abs().max() < 0.02 * before.abs().max()


def test_extra_losses_are_those_of_the_last_training_forward() -> None:
    net, batch = small(balance=0.5), dense()
    assert training_module(net).extra_losses() == {}
    net.train()(batch, TIMES)
    extra = training_module(net).extra_losses()["balance"]
    assert net.balances is not None
    assert extra.item() == pytest.approx(net.balances.sum().item())
    extra.backward()
    learning = {name for name, p in net.named_parameters() if p.grad is not None and (p.grad != 0).any()}
    assert {f"blocks.{i}.moe.gate.weight" for i in range(2)} <= learning
    assert not any("blocks.1.moe.experts" in name or "final_layer" in name for name in learning)
    net.eval()(batch, TIMES)
    assert training_module(net).extra_losses() == {}


@pytest.mark.parametrize("over", ["tokens", "sequence"])
def test_uniform_routers_cost_their_weight_in_every_block(over: str) -> None:
    net = small(balance=0.01, balance_over=over).train()
    for mixture in net.mixtures:
        nn.init.zeros_(mixture.gate.weight)
    net(dense(), TIMES)
    assert training_module(net).extra_losses()["balance"].item() == pytest.approx(2 * 0.01, rel=1e-6)


def test_no_weight_is_no_balance_loss() -> None:
    net = small(balance=0.0).train()
    _, gradients = loss_and_gradients(net, dense(), TIMES)
    assert training_module(net).extra_losses() == {}
    assert len(gradients) == len(list(net.parameters()))


def test_diagnostics_bound_the_load_of_every_expert() -> None:
    net = small()
    assert training_module(net).diagnostics() == {}
    net(dense(), TIMES)
    shown = training_module(net).diagnostics()
    assert list(shown) == [f"experts/layer{i:02d}/load_{name}" for i in range(2) for name in ("max", "min")]
    assert net.loads is not None
    torch.testing.assert_close(net.loads.sum(dim=1), torch.ones(2))
    for layer in range(2):
        assert shown[f"experts/layer{layer:02d}/load_max"] >= 1 / 4 >= shown[f"experts/layer{layer:02d}/load_min"]


def test_a_network_can_be_copied_after_a_training_forward() -> None:
    net = small().train()
    net(dense(), TIMES)
    twin = copy.deepcopy(net)
    assert training_module(twin).extra_losses() == {} and "balance" in training_module(net).extra_losses()
    assert torch.equal(twin(dense(), TIMES), net(dense(), TIMES))


def test_activation_checkpointing_gives_equal_gradients() -> None:
    plain, saving = small().train(), small(activation_checkpointing=True).train()
    loss, gradients = loss_and_gradients(plain, dense(), TIMES)
    again, others = loss_and_gradients(saving, dense(), TIMES)
    assert torch.equal(loss, again)
    assert torch.equal(
        training_module(plain).extra_losses()["balance"], training_module(saving).extra_losses()["balance"]
    )
    assert_equal_gradients(others, gradients, 1e-6)
    assert len(gradients) == len(list(plain.parameters()))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_equals_eager(backend: str) -> None:
    eager, compiled = small(depth=1, balance=0.3).train(), small(depth=1, balance=0.3).train()
    compiled.compile(fullgraph=True, backend=backend)
    loss, gradients = loss_and_gradients(eager, dense(), TIMES)
    again, others = loss_and_gradients(compiled, dense(), TIMES)
    torch.testing.assert_close(again, loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(training_module(compiled).extra_losses(), training_module(eager).extra_losses())
    torch.testing.assert_close(training_module(compiled).diagnostics(), training_module(eager).diagnostics())
    assert_equal_gradients(others, gradients, 1e-4)


def test_bf16_autocast_stays_close_to_fp32() -> None:
    net, batch = small(depth=4, qk_norm="layernorm"), dense()
    exact = net(batch, TIMES)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = net(batch, TIMES)
    assert rounded.dtype == torch.float32
    assert 1e-4 < (rounded - exact).norm() / exact.norm() < 0.1  # rounding moves a few tokens to other experts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"qk_norm": "rms"}, r"model\.qk_norm=rms is unknown; choose one of none, layernorm, layernorm_half"),
        ({"balance_over": "images"}, r"model\.balance_over=images is unknown; choose tokens or sequence"),
        ({"top_k": 5}, r"model\.top_k=5 must lie between 1 and model\.experts=4"),
        ({"learn_sigma": "auto"}, r"model\.learn_sigma=auto is unknown"),
        ({"width": 30}, r"model\.width=30 must be a multiple of 4 and of model\.heads=2"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiTMoE(**{**SMALL, **options})


@pytest.mark.parametrize(("qk_norm", "shared"), [("none", 1), ("layernorm", 2), ("none", 0)])
def test_weights_go_out_and_come_in_unchanged(qk_norm: str, shared: int) -> None:
    net = small(qk_norm=qk_norm, shared_experts=shared, learn_sigma=False, unused_half=True)
    official = to_official(net.state_dict(), 2, (4, 4))
    assert official["pos_embed"].shape == (1, 16, 32)
    assert official["blocks.1.moe.experts.3.up_proj.weight"].shape == (64, 32)
    assert ("blocks.0.moe.shared_experts.down_proj.weight" in official) == (shared > 0)
    assert ("blocks.0.attn.Wqkv.bias" in official) == (qk_norm != "none")
    back = from_official(official)
    assert back.keys() == net.state_dict().keys()
    assert all(torch.equal(back[key], value) for key, value in net.state_dict().items())


def test_official_weights_tell_the_options() -> None:
    plain = official_options(to_official(small().state_dict(), 2, (4, 4)))
    assert plain == {key: SMALL[key] for key in plain}
    assert not {"heads", "top_k", "norm_topk", "balance"} & plain.keys()
    large = {"qk_norm": "layernorm", "learn_sigma": False, "unused_half": True, "shared_experts": 0, "heads": 4}
    told = official_options(to_official(small(**large).state_dict(), 2, (4, 4)))
    assert told == {**plain, **large}


def test_foreign_weights_are_refused() -> None:
    official = to_official(small().state_dict(), 2, (4, 4))
    with pytest.raises(ValueError, match=r"no state dict of DiT-MoE: it has no router blocks\.0\.moe\.gate\.weight"):
        from_official({key: value for key, value in official.items() if "gate.weight" not in key})
    absent = "blocks.1.moe.experts.2.up_proj.weight"
    with pytest.raises(ValueError, match=rf"these weights of DiT-MoE lack {absent}"):
        from_official({key: value for key, value in official.items() if key != absent})
    with pytest.raises(ValueError, match=r"1 unexpected \(blocks\.0\.moe\.experts\.4\.up_proj\.weight\)"):
        extra = from_official({**official, "blocks.0.moe.experts.4.up_proj.weight": torch.ones(64, 32)})
        checkpoint_io.load_strict(small(), extra, Path("weights.pt"))
    with pytest.raises(ValueError, match="pos_embed is not DiT's sine-cosine table"):
        from_official({**official, "pos_embed": official["pos_embed"].flip(1)})


def test_an_upcycled_network_begins_where_the_one_expert_ended() -> None:
    """Where weights sum to one, k copies of an expert are that expert."""
    one = small(experts=1, top_k=1)
    many = DiTMoE(**{**SMALL, "norm_topk": True})
    many.load_state_dict(upcycle(one.state_dict(), 4, torch.Generator().manual_seed(0)))
    batch = dense()
    torch.testing.assert_close(many(batch, TIMES), one(batch, TIMES), atol=1e-4, rtol=1e-5)
    routers = torch.stack([mixture.gate.weight for mixture in many.mixtures])
    assert routers.std().item() == pytest.approx(0.02, rel=0.15)


def test_only_one_expert_can_be_upcycled() -> None:
    with pytest.raises(ValueError, match=r"one expert .*blocks of 4 experts"):
        upcycle(small().state_dict(), 8, torch.Generator())
    own = ("qk_norm", "experts", "top_k", "norm_topk", "shared_experts", "balance", "balance_over", "eval_gradients")
    options = {key: value for key, value in SMALL.items() if key not in own}
    with pytest.raises(ValueError, match="no experts, and a GELU MLP cannot become a SwiGLU"):
        upcycle(DiT(**options).state_dict(), 8, torch.Generator())


def test_routing_is_counted_by_class_time_and_token() -> None:
    net = small(depth=3).eval()
    objective = Gaussian(
        timesteps=1000, schedule="linear", prediction="epsilon", variance="learned_range", loss="hybrid",
        clip_x0=True, weight="image",
    )  # fmt: skip
    times = objective.times(5, "gaussian")
    guidance = {"name": "cfg", "scale": 1.5, "interval": [0.0, 1.0], "channels": "all"}
    batch = Dense(2).to_batch(latents([(8, 8)] * 3), torch.tensor([7, 2, 7]))
    field = objective.field(net, guidance_of(**guidance))

    class StepNoise:
        def normal(self, step: int) -> Tensor:
            return Rng(step).normal("noise", batch.x.shape)

    with RoutingCounts(net, times, 10).counting() as counts:
        SAMPLERS["ddpm"](field, batch, times, StepNoise())
    net(batch, TIMES)  # no longer counted
    choices = 16 * 2  # of an image and a step
    assert counts.per_class.sum(dim=2)[7].tolist() == [2 * 5 * choices] * 3
    assert counts.per_class.sum(dim=2)[2].tolist() == [5 * choices] * 3
    assert counts.per_class.sum() == 3 * 3 * 5 * choices
    assert (counts.per_time.sum(dim=2) == 3 * choices).all()
    assert counts.per_token.shape == (3, 16, 4)
    assert (counts.per_token.sum(dim=2) == 3 * 5 * 2).all()
    assert torch.equal(counts.per_time.sum(dim=1), counts.per_token.sum(dim=1))


def test_routing_of_two_sizes_is_not_counted_together() -> None:
    net = small()
    with RoutingCounts(net, TIMES, 10).counting():
        net(dense((8, 8)), TIMES)
        with pytest.raises(ValueError, match="an image of 4 tokens after images of 16; count one size"):
            net(dense((4, 4)), TIMES)
