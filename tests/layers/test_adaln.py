"""The parts of adaptive layer norm."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from genfound.batch import Batch
from genfound.layers.adaln import multiply_add, norm_modulate
from genfound.layouts.packed import Packed

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


IMAGES = [(16, 8), (1, 3), (8, 16), (12, 12)]
"""Rows and columns of latents whose tokens are packed, or the first of them, twice, in a dense batch."""


@pytest.mark.parametrize("layout", ["dense", "packed"])
@pytest.mark.parametrize("norm", [None, nn.LayerNorm(64, eps=1e-6, elementwise_affine=False), nn.RMSNorm(64)])
def test_images_whose_factors_are_weights_of_their_norm(
    layout: str, norm: nn.Module | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = _packed() if layout == "packed" else None
    inputs = drawn(
        ((2, 128, 64), *[(2, 1, 64)] * 2) if batch is None else ((batch.slots, 64), *[(len(batch.y), 64)] * 2)
    )

    def derived() -> tuple[Tensor, ...]:
        out = norm_modulate(*inputs, batch, norm)
        return out, *torch.autograd.grad((out * torch.linspace(-1, 2, out.numel()).view_as(out)).sum(), inputs)

    monkeypatch.setattr("genfound.layers.adaln.OWN_CALL", 0)
    found = derived()
    monkeypatch.setattr("genfound.layers.adaln.OWN_CALL", torch.inf)  # one operation for all images
    for own, plain in zip(found, derived(), strict=True):
        torch.testing.assert_close(own, plain, atol=2e-5, rtol=1e-5)


def test_an_image_of_its_own_call_takes_one_pass() -> None:
    batch = _packed()
    x, shift, factor = drawn(((batch.slots, 128), (len(batch.y), 128), (len(batch.y), 128)))
    for channels, gathers in ((128, 0), (32, 2)):  # of which 32 are too few for calls of their own
        with Operations("index_select") as operations:
            norm_modulate(x[:, :channels], shift[:, :channels], factor[:, :channels], batch)
        assert operations.count == gathers


def _packed() -> Batch:
    """Images of `IMAGES`, and rows of none."""
    layout = Packed(patch_size=1, max_tokens=sum(rows * columns for rows, columns in IMAGES), max_images=6)
    return layout.to_batch([torch.zeros(3, *sides) for sides in IMAGES], torch.zeros(len(IMAGES), dtype=torch.long))
