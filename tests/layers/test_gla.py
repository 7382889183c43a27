"""The recurrence of gated linear attention: every form against the sequential one."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from genfound.layers import gla
from genfound.layers.gla import Rows, choose_form, gated_linear_attention
from tests.helpers import packed


def given(tokens: int, strength: float = 1.0, size: tuple[int, ...] = (2, 3, 8, 6), seed: int = 0) -> list[Tensor]:
    """q, k, v and logarithms of decays in float64; gates are strong from a strength of 100."""
    rows, heads, key, value = size
    generator = torch.Generator().manual_seed(seed)
    q, k, v, logits = (
        torch.randn(rows, tokens, heads, width, generator=generator, dtype=torch.float64)
        for width in (key, key, value, key)
    )
    return [x.requires_grad_() for x in (q, k, v, logsigmoid(logits * strength) / 16)]


def results(form: str, tensors: list[Tensor], rows: Rows | None = None) -> list[Tensor]:
    """The output and the gradients of a weighted sum of it."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = gated_linear_attention(*leaves, rows, form)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    return [out.detach(), *(x.grad for x in leaves if x.grad is not None)]


@pytest.mark.parametrize("strength", [1.0, 100.0, 3000.0])
@pytest.mark.parametrize("tokens", [1, 63, 64, 130])
def test_chunks_give_what_the_sequence_gives(tokens: int, strength: float, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = given(tokens, strength)
    expected = results("reference", tensors)
    for lowest in (gla.LOWEST, torch.inf):  # as decays are, and as if they were too strong
        monkeypatch.setattr(gla, "LOWEST", lowest)
        for found, wanted in zip(results("chunked", tensors), expected, strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-10 * (1 + wanted.abs().max().item()), rtol=0)


def test_strong_gates_stay_finite_and_exact_in_float32() -> None:
    tensors = [x.detach().float() for x in given(200, 3000.0)]
    assert tensors[3].sum(dim=1).min() < -2000  # exp of it is 0, and of its negative infinite
    for found, wanted in zip(results("chunked", tensors), results("reference", tensors), strict=True):
        assert found.isfinite().all()
        torch.testing.assert_close(found, wanted, atol=5e-5 * wanted.abs().max().item(), rtol=0)


@pytest.mark.parametrize("form", ["reference", "chunked"])
def test_the_recurrence_ends_where_an_image_ends(form: str) -> None:
    """Images of a static pack, after which come empty rows and filler, are as alone."""
    sizes = [(3, 5), (16, 8), (1, 1), (8, 8), (7, 10)]
    batch = packed(sizes, max_tokens=400, max_images=7)
    tensors = given(400, size=(1, 2, 4, 6))
    alone = [given_of.split(batch.tokens.tolist(), dim=1) for given_of in tensors]
    pieces = [results("reference", list(image)) for image in zip(*alone, strict=True) if image[0].shape[1]]
    found = gated_linear_attention(*tensors, Rows.of(batch), form)
    torch.testing.assert_close(found, torch.cat([out for out, *_ in pieces], dim=1), atol=1e-12, rtol=0)
    expected = results("reference", tensors, Rows.of(batch))
    for ours, wanted in zip(results(form, tensors, Rows.of(batch)), expected, strict=True):
        torch.testing.assert_close(ours, wanted, atol=1e-10, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [False, True])
def test_the_kernels_of_fla_give_what_the_sequence_gives(rows: bool) -> None:
    pytest.importorskip("fla")
    batch = packed([(8, 8), (5, 9), (10, 12)], max_tokens=256, max_images=6).to("cuda")
    tensors = [x.detach().float().cuda() for x in given(256, size=(1, 2, 16, 32))]
    where = Rows.of(batch) if rows else None
    for found, wanted in zip(results("fla", tensors, where), results("reference", tensors, where), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-2 * wanted.abs().max().item(), rtol=0)


def best(run: Callable[[], object], times: int) -> float:
    found = []
    for _ in range(times):
        begin = time.thread_time()
        run()
        found.append(time.thread_time() - begin)
    return min(found)


@pytest.mark.slow
def test_chunks_are_much_faster() -> None:
    """At 1,024 tokens on the CPU ten times in a forward pass, and twenty times with the backward pass."""
    tensors = [x.detach().float() for x in given(1024, size=(1, 2, 16, 32))]

    def step(form: str) -> None:
        gated_linear_attention(*tensors, form=form)

    def train(form: str) -> None:
        results(form, tensors)

    for run, factor in ((step, 10), (train, 20)):
        run("chunked")
        slow, fast = (best(functools.partial(run, form), n) for form, n in (("reference", 3), ("chunked", 10)))
        assert slow / fast > factor


def test_what_cannot_run_is_named() -> None:
    assert choose_form("auto", "cpu", 32) == "chunked"
    with pytest.raises(ValueError, match=r"^model.recurrence=fast is unknown; choose one of auto, reference, chunked"):
        choose_form("fast", "cpu", 32)
    with pytest.raises(ValueError, match=r"^model.recurrence=fla needs the package flash-linear-attention"):
        choose_form("fla", "cpu", 32)
