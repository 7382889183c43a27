from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from genfound.layers.attention import BACKENDS, available_backends, choose_backend, packed_attention

LENGTHS = {
    "equal": [4, 4, 4],
    "unequal": [5, 2, 9],
    "runs": [3, 3, 7, 3, 3, 3],
    "empty_rows": [0, 4, 0, 0, 6, 0],
    "single_tokens": [1, 1, 5, 1],
    "one_row": [11],
}


def bounds(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def inputs(
    tokens: int, heads: int = 2, size: int = 8, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple:
    generator = torch.Generator().manual_seed(3)
    drawn = (torch.randn(tokens, heads, size, generator=generator) for _ in range(4))
    q, k, v, upstream = (a.to(device, dtype) for a in drawn)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), upstream


def naive(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    out, start = [], 0
    for n in lengths:
        rows = slice(start, start + n)
        scores = torch.einsum("ihd,jhd->hij", q[rows], k[rows]) / math.sqrt(q.shape[-1])
        weights = torch.exp(scores - scores.max(-1, keepdim=True).values) if n else scores
        out.append(torch.einsum("hij,jhd->ihd", weights / weights.sum(-1, keepdim=True), v[rows]))
        start += n
    return torch.cat(out)


def output_and_gradients(function, q: Tensor, k: Tensor, v: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
    out = function(q, k, v)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), upstream.to(out.dtype))


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_loop_is_exact_softmax_within_each_row(lengths: list[int]) -> None:
    tensors = inputs(sum(lengths))
    cu = bounds(lengths)
    ours = output_and_gradients(lambda q, k, v: packed_attention(q, k, v, cu, max(lengths), "loop"), *tensors)
    reference = output_and_gradients(lambda q, k, v: naive(q, k, v, lengths), *tensors)
    for mine, expected in zip(ours, reference, strict=True):
        torch.testing.assert_close(mine, expected, atol=2e-6, rtol=1e-5)


def test_a_single_token_returns_its_value() -> None:
    q, k, v, _ = inputs(3)
    assert torch.equal(packed_attention(q, k, v, bounds([1, 1, 1]), 1, "loop"), v)


def test_tokens_of_other_rows_have_no_influence() -> None:
    q, k, v, _ = inputs(10)
    cu = bounds([4, 6])
    before = packed_attention(q, k, v, cu, 6, "loop")
    changed = (torch.cat([a[:4], a[4:] * 7 + 1]) for a in (q, k, v))
    assert torch.equal(packed_attention(*changed, cu, 6, "loop")[:4], before[:4])


@pytest.mark.parametrize("names", [("equal", "unequal"), ("empty_rows",)])
def test_compiled_equals_eager_without_a_graph_break(names: tuple[str, ...]) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
        return packed_attention(q * 2, k, v, cu, 16, "loop") + 1

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for name in names:
        cu = bounds(LENGTHS[name])
        tensors = inputs(sum(LENGTHS[name]))
        eager = output_and_gradients(lambda q, k, v, cu=cu: attend(q, k, v, cu), *tensors)
        traced = output_and_gradients(lambda q, k, v, cu=cu: compiled(q, k, v, cu), *tensors)
        for mine, expected in zip(traced, eager, strict=True):
            torch.testing.assert_close(mine, expected, atol=1e-6, rtol=1e-6)


def test_half_precision_values_keep_their_dtype() -> None:
    q, k, v, _ = inputs(9)
    out = packed_attention(q, k, v.bfloat16(), bounds([4, 5]), 5, "loop")
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), naive(q, k, v.bfloat16().float(), [4, 5]), atol=0.02, rtol=0.02)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.attention=fast is unknown.*auto, loop") as error:
        choose_backend("fast", "cpu", torch.float32)
    assert all(name in str(error.value) for name in BACKENDS)


@pytest.mark.parametrize("backend", ["flash", "varlen", "flex"])
def test_a_backend_that_cannot_run_here_is_refused(backend: str) -> None:
    with pytest.raises(ValueError, match=rf"model\.attention={backend} cannot run on cpu.*available: loop"):
        choose_backend(backend, "cpu", torch.float32)


def test_auto_takes_the_first_available_backend() -> None:
    assert available_backends("cpu", torch.float32) == ["loop"]
    assert choose_backend("auto", "cpu", torch.float32) == "loop"
    on_cuda = available_backends("cuda", torch.bfloat16)
    assert on_cuda[-2:] == ["flex", "loop"]
    assert choose_backend("auto", "cuda", torch.bfloat16) == on_cuda[0]


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[64, 64, 64], [100, 28, 0, 1, 63, 0]], ids=["equal", "ragged"])
def test_every_available_backend_equals_loop(lengths: list[int]) -> None:
    tensors = inputs(sum(lengths), heads=4, size=64, device="cuda", dtype=torch.bfloat16)
    cu = bounds(lengths).cuda()

    def run(backend: str) -> tuple[Tensor, ...]:
        return output_and_gradients(lambda q, k, v: packed_attention(q, k, v, cu, 128, backend), *tensors)

    reference = run("loop")
    names = available_backends("cuda", torch.bfloat16)
    assert len(names) >= 2
    for name in names:
        for mine, expected in zip(run(name), reference, strict=True):
            torch.testing.assert_close(mine, expected, atol=0.03, rtol=0.03, msg=lambda m, n=name: f"{n}: {m}")
