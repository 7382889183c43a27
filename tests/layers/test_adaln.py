"""The parts of adaptive layer norm."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from genfound.batch import Batch
from genfound.layers.adaln import multiply_add, norm_modulate
from genfound.layouts import Packed, Padded

SHAPES = [((5, 8), (5, 8), (5, 8)), ((2, 1, 8), (2, 5, 8), (2, 1, 8)), ((2, 5, 8), (2, 5, 8), (8,))]


def drawn(shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_addcmul_with_its_gradients(shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype) -> None:
    found, expected = multiply_add(*drawn(shapes, dtype)), torch.addcmul(*drawn(shapes, dtype))
    assert torch.equal(found, expected)
    for own, known in zip(*(_gradients(f, drawn(shapes, dtype)) for f in (multiply_add, torch.addcmul)), strict=True):
        assert own.shape == known.shape and own.dtype == dtype and torch.equal(own, known)


def _gradients(function: object, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    assert callable(function)
    out = function(*inputs)
    return torch.autograd.grad((out * torch.linspace(-1, 2, out.numel()).view_as(out).to(out.dtype)).sum(), inputs)


class Operations(TorchDispatchMode):
    """Counts the calls of one of PyTorch's operations."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.count = name, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += function.overloadpacket is getattr(torch.ops.aten, self.name)
        return function(*args, **(kwargs or {}))


def test_its_gradient_takes_two_products() -> None:
    inputs = drawn(SHAPES[0])
    out = multiply_add(*inputs)
    with Operations("mul") as products:
        torch.autograd.grad(out, inputs, torch.ones_like(out))
    assert products.count == 2


def test_other_derivatives_are_those_of_addcmul() -> None:
    inputs = tuple(x.double().detach().requires_grad_() for x in drawn(SHAPES[0]))
    assert torch.autograd.gradcheck(multiply_add, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(multiply_add, inputs)
    plain, tangents = [x.detach() for x in inputs], [x.detach().flip(0) for x in inputs]
    for form in (lambda f: torch.func.jvp(f, (*plain,), (*tangents,)), lambda f: torch.func.vmap(f)(*plain)):
        torch.testing.assert_close(form(multiply_add), form(torch.addcmul))


IMAGES = [(16, 8), (1, 3), (32, 32), (12, 12)]
"""Rows and columns of latents."""


def batch_of(layout: str) -> Batch:
    """Of `IMAGES`, with an empty row and one of filler where they are packed."""
    tokens = sum(rows * columns for rows, columns in IMAGES)
    kinds = {"packed": Packed(1, max_tokens=tokens + 17, max_images=5), "padded": Padded(1)}
    return kinds[layout].to_batch([torch.zeros(3, *sides) for sides in IMAGES], torch.zeros(len(IMAGES)).long())


def adaln_inputs(batch: Batch | None, width: int) -> list[Tensor]:
    """x, shift and factor of a batch, or of two images of 16 tokens."""
    if batch is None:
        return drawn(((2, 16, width), (2, 1, width), (2, 1, width)))
    packed, images = batch.layout == "packed", len(batch.y)
    x = (batch.slots, width) if packed else (images, batch.slots // images, width)
    per_image = (images, width) if packed else (images, 1, width)
    return drawn((x, per_image, per_image))


NORMS = {
    "none": None, "eps": nn.LayerNorm(64, eps=1e-2, elementwise_affine=False), "affine": nn.LayerNorm(64),
    "rms": nn.RMSNorm(64),
}  # fmt: skip


@pytest.mark.parametrize("layout", ["dense", "padded", "packed"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_modulated_norms_and_their_gradients_are_those_of_float64(
    layout: str, norm: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("genfound.layers.adaln.OWN_CALL", 1)
    batch = None if layout == "dense" else batch_of(layout)
    inputs = [x.detach().to(dtype).requires_grad_() for x in adaln_inputs(batch, 64)]
    function = copy.deepcopy(NORMS[norm])

    def derived(norm: nn.Module | None, dtype: torch.dtype) -> tuple[Tensor, ...]:
        own = [x.detach().to(dtype).requires_grad_() for x in inputs]
        out = norm_modulate(*own, batch, norm)
        return out, *torch.autograd.grad((out * torch.linspace(-1, 2, out.numel()).view_as(out).to(dtype)).sum(), own)

    found = derived(None if function is None else function.to(dtype), dtype)
    exact = derived(None if function is None else function.double(), torch.float64)
    most = 1e-5 if dtype == torch.float32 else 1e-2
    for own, known in zip(found, exact, strict=True):
        assert own.dtype == dtype and (own - known).norm() < most * known.norm()


def test_large_images_have_calls_of_their_own_and_nothing_is_gathered() -> None:
    batch = batch_of("packed")
    for width, gathers in ((128, 0), (16, 2)):  # of which 16 are too few
        inputs = adaln_inputs(batch, width)
        with Operations("index_select") as operations:
            norm_modulate(*inputs, batch)
        assert operations.count == gathers
