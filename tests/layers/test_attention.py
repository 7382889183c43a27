from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import create_block_mask

from genfound.backbones.base import Backbone
from genfound.layers import attention
from genfound.layers.attention import BACKENDS, available_backends, choose_backend, document_mask, packed_attention
from tests.backbones.test_fit import small_fit
from tests.helpers import loss_and_gradients, packed, small_nit

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


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, int], None]]:
    """Makes this machine one with every package, and a graphics card of a capability."""

    def of(*capability: int) -> None:
        available_backends.cache_clear()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(attention, "_installed", lambda _: True)

    yield of
    available_backends.cache_clear()


def test_auto_takes_only_kernels_that_the_card_has(card: Callable[[int, int], None]) -> None:
    found = {}
    for capability in ((6, 1), (7, 5), (8, 0), (9, 0)):
        card(*capability)
        for dtype in (torch.float32, torch.bfloat16):
            assert choose_backend("auto", "cuda", dtype) == available_backends("cuda", dtype)[0]
            found[capability, dtype] = available_backends("cuda", dtype)
        assert available_backends("cpu", torch.float32) == ("loop",)
    assert found[(6, 1), torch.bfloat16] == found[(6, 1), torch.float32] == ("loop",)
    assert found[(7, 5), torch.bfloat16] == found[(7, 5), torch.float32] == ("loop", "flex")
    for capability in ((8, 0), (9, 0)):
        assert found[capability, torch.bfloat16] == ("flash", "varlen", "loop", "flex")
        assert found[capability, torch.float32] == ("loop", "flex")


@pytest.mark.parametrize("deterministic", [False, True])
def test_flash_attention_is_deterministic_where_all_is(deterministic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def kernel(q: Tensor, k: Tensor, v: Tensor, *_: Any, **options: Any) -> Tensor:
        given.update(options)
        return v

    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=kernel))
    q, k, v, _ = inputs(9)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    BACKENDS["flash"](q, k, v, bounds([4, 5]), 5)
    assert given == {"deterministic": deterministic}


PACKS = [[100, 28, 0, 1, 255, 16], [400], [128, 128, 100, 3, 41], [1] * 399 + [1]]


def image_of(lengths: list[int]) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))


@pytest.mark.parametrize("lengths", PACKS)
def test_a_block_mask_is_that_of_the_definition(lengths: list[int]) -> None:
    rows, tokens = image_of(lengths), sum(lengths)
    theirs = create_block_mask(lambda b, h, i, j: rows[i] == rows[j], None, None, tokens, tokens, device="cpu")
    ours = document_mask(rows)
    assert ours.seq_lengths == theirs.seq_lengths and ours.BLOCK_SIZE == theirs.BLOCK_SIZE
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))


@pytest.fixture
def flex_here(monkeypatch: pytest.MonkeyPatch, fresh_compiler: None) -> list[Tensor]:
    """Flex without its kernels and without gradients, which is all that a CPU has; the masks that are made."""
    made: list[Tensor] = []

    def mask(rows: Tensor) -> Any:
        made.append(rows)
        return document_mask(rows)

    monkeypatch.setattr(attention, "available_backends", lambda *_: ("loop", "flex"))
    monkeypatch.setattr(attention, "_compiled_flex", lambda: attention.flex_attention)
    monkeypatch.setattr(attention, "document_mask", mask)
    return made


UNLIKE = [[(8, 16), (3, 5), (2, 70)], [(16, 16), (1, 7)], [(2, 2)] * 5]
"""Rows and columns of the images of three packs."""


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("make", [small_nit, small_fit])
@pytest.mark.parametrize("compiled", [False, True])
def test_flex_makes_one_mask_for_all_blocks_of_a_pack(
    make: Callable[..., Backbone], compiled: bool, flex_here: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    counters.clear()
    reference, net = make(depth=3, attention="loop"), make(depth=3, attention="flex")
    if compiled:
        net.train().compile_blocks()
    p = net.token_spec.patch_size
    for number, sizes in enumerate(UNLIKE, start=1):
        batch = packed([(p * h, p * w) for h, w in sizes], patch_size=p, max_tokens=300, max_images=6)
        t = torch.linspace(0.1, 0.9, len(batch.y))
        torch.testing.assert_close(net(batch, t), reference(batch, t), atol=1e-5, rtol=1e-5)
        assert len(flex_here) == number
    assert not counters["graph_break"] and (counters["stats"]["unique_graphs"] == 1 or not compiled)


@pytest.mark.gpu
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("backend", "dtype"), [("varlen", torch.bfloat16), ("flex", torch.bfloat16), ("flex", torch.float32)]
)
def test_compiled_blocks_have_no_break_and_are_compiled_at_most_twice(backend: str, dtype: torch.dtype) -> None:
    """The second time for another bound on the lengths."""
    counters.clear()
    reference, net = (small_nit(depth=3, width=128, attention=name).cuda().train() for name in ("loop", backend))
    net.compile_blocks()
    for sizes in UNLIKE:
        batch = packed(sizes, max_tokens=300, max_images=6).to("cuda")
        t = torch.linspace(0.1, 0.9, len(batch.y), device="cuda")
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
            (loss, _), (other, _) = (loss_and_gradients(a, batch, t) for a in (reference, net))
        torch.testing.assert_close(other, loss, atol=0, rtol=1e-3 if dtype == torch.float32 else 0.05)
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] <= 2


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


def across(lengths: list[int], tail: int = 3) -> tuple[attention.Keys, list[int], int]:
    """Rows of other lengths to attend to, with a tail that is of none."""
    other = [n and (3 * n) % 7 + 1 for n in lengths]
    return attention.Keys(bounds(other), max(other)), other, sum(other) + tail


def naive_across(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], other: list[int]) -> Tensor:
    rows = zip(q.split(lengths), k[: sum(other)].split(other), v[: sum(other)].split(other), strict=True)
    weights = (((torch.einsum("ihd,jhd->hij", a, b) / math.sqrt(q.shape[-1])).softmax(-1), c) for a, b, c in rows)
    return torch.cat([torch.einsum("hij,jhd->ihd", w, c) for w, c in weights])


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_rows_attend_to_those_of_another_sequence(lengths: list[int], compiled: bool, fresh_compiler: None) -> None:
    keys, other, total = across(lengths)
    (q, _, _, upstream), (_, k, v, _) = inputs(sum(lengths)), inputs(total)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return packed_attention(q, k, v, bounds_q, max(lengths), "loop", keys=keys)

    bounds_q = bounds(lengths)
    function = torch.compile(attend, fullgraph=True, backend="aot_eager") if compiled else attend
    ours = output_and_gradients(function, q, k, v, upstream)
    reference = output_and_gradients(lambda q, k, v: naive_across(q, k, v, lengths, other), q, k, v, upstream)
    for mine, expected in zip(ours, reference, strict=True):
        torch.testing.assert_close(mine, expected, atol=2e-6, rtol=1e-5)
    assert (ours[2][sum(other) :] == 0).all()  # nothing attends to the tail


@pytest.mark.parametrize("lengths", PACKS)
def test_a_block_mask_of_two_sequences_is_that_of_the_definition(lengths: list[int]) -> None:
    rows, tokens = image_of(lengths), sum(lengths)
    of_keys = torch.cat([image_of([n and n // 2 + 1 for n in lengths]), torch.full((200,), len(lengths))])
    ours = document_mask(rows, of_keys)
    theirs = create_block_mask(lambda b, h, i, j: rows[i] == of_keys[j], None, None, tokens, len(of_keys), device="cpu")
    assert ours.seq_lengths == theirs.seq_lengths and torch.equal(ours.to_dense(), theirs.to_dense())
    for name in ("kv_num_blocks", "full_kv_num_blocks"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))


def test_kernels_are_told_the_rows_of_the_keys_and_give_their_tail_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Theirs has chance numbers there, here none at all."""
    given: list[Any] = []

    def kernel(q: Tensor, k: Tensor, v: Tensor, *where: Any, **_: Any) -> Tensor:
        given.append(where)
        return q + (k.sum() + v.sum()) * float("nan")

    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=kernel))
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    keys, other, total = across([4, 5])
    (q, *_), (_, k, v, _) = inputs(9), inputs(total)
    for name in ("flash", "varlen"):
        out = BACKENDS[name](q, k, v, bounds([4, 5]), 5, keys)
        for gradient in torch.autograd.grad(out.sum(), (k, v)):
            assert (gradient[sum(other) :] == 0).all() and gradient[: sum(other)].isnan().all()
    assert [(cu.tolist(), cu_k.tolist(), *most) for cu, cu_k, *most in given] == [
        ([0, 4, 9], [0, *torch.tensor(other).cumsum(0).tolist()], 5, max(other))
    ] * 2


@pytest.mark.gpu
def test_every_available_backend_equals_loop_across_sequences() -> None:
    lengths = [100, 28, 0, 1, 63, 0]
    keys, _, total = across(lengths, 50)
    keys = keys._replace(cu_seqlens=keys.cu_seqlens.cuda())
    make = functools.partial(inputs, heads=4, size=64, device="cuda", dtype=torch.bfloat16)
    (q, _, _, upstream), (_, k, v, _) = make(sum(lengths)), make(total)
    cu = bounds(lengths).cuda()

    def run(backend: str) -> tuple[Tensor, ...]:
        return output_and_gradients(lambda *a: packed_attention(*a, cu, 128, backend, keys=keys), q, k, v, upstream)

    reference = run("loop")
    for name in available_backends("cuda", torch.bfloat16):
        for mine, expected in zip(run(name), reference, strict=True):
            torch.testing.assert_close(mine, expected, atol=0.03, rtol=0.03, msg=lambda m, n=name: f"{n}: {m}")
