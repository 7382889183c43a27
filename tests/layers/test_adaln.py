"""The parts of adaptive layer norm."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from genfound.layers.adaln import multiply_add

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


def test_its_gradient_takes_two_products() -> None:
    class Products(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            Products.count += function.overloadpacket is torch.ops.aten.mul
            return function(*args, **(kwargs or {}))

    inputs = drawn(SHAPES[0])
    out = multiply_add(*inputs)
    with Products():
        torch.autograd.grad(out, inputs, torch.ones_like(out))
    assert Products.count == 2


def test_other_derivatives_are_those_of_addcmul() -> None:
    inputs = tuple(x.double().detach().requires_grad_() for x in drawn(SHAPES[0]))
    assert torch.autograd.gradcheck(multiply_add, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(multiply_add, inputs)
    plain, tangents = [x.detach() for x in inputs], [x.detach().flip(0) for x in inputs]
    for form in (lambda f: torch.func.jvp(f, (*plain,), (*tangents,)), lambda f: torch.func.vmap(f)(*plain)):
        torch.testing.assert_close(form(multiply_add), form(torch.addcmul))
