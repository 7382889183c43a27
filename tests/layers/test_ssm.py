"""The selective scan: every form against the sequential one, and what a mixer begins with."""

from __future__ import annotations

import functools
import math
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from genfound.layers.initial import Draw
from genfound.layers.ssm import FORMS, Mamba, choose_form, selective_scan


def given(length: int, strength: float = 1.0, rows: int = 2, channels: int = 6, states: int = 4) -> list[Tensor]:
    """u, delta, z, A, B, C, D and the bias of delta, in float64."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    u, delta, z = (normal(rows, channels, length) for _ in range(3))
    a = -strength * torch.arange(1, states + 1).double() * normal(channels, states).exp()
    b, c = normal(rows, states, length), normal(rows, states, length)
    return [u, strength * delta, z, a, b, c, normal(channels), normal(channels)]


def results(form: str, tensors: list[Tensor], fresh: Tensor | None = None) -> list[Tensor]:
    """The output and the gradients of a weighted sum of it."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = selective_scan(*leaves, form, fresh)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    return [out.detach(), *(x.grad for x in leaves if x.grad is not None)]


@pytest.mark.parametrize("strength", [0.1, 1.0, 20.0])
@pytest.mark.parametrize("length", [1, 7, 8, 9, 126, 300])
def test_chunks_give_what_the_sequence_gives(length: int, strength: float) -> None:
    tensors = given(length, strength)
    for found, wanted in zip(results("chunked", tensors), results("reference", tensors), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-10 * (1 + wanted.abs().max().item()), rtol=0)


LENGTHS = [1, 7, 40, 2, 129, 64, 3]


def of_images(tensors: list[Tensor]) -> list[Tensor]:
    """The results of a pack, image by image."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    every = [x.split(LENGTHS, dim=2) if i in (0, 1, 2, 4, 5) else [x] * len(LENGTHS) for i, x in enumerate(leaves)]
    out = torch.cat([selective_scan(*image, "reference") for image in zip(*every, strict=True)], dim=2)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    return [out.detach(), *(x.grad for x in leaves if x.grad is not None)]


@pytest.mark.parametrize("strength", [0.1, 1.0, 20.0])
@pytest.mark.parametrize("form", ["reference", "chunked"])
def test_images_of_a_pack_begin_with_nothing(form: str, strength: float) -> None:
    tensors = given(sum(LENGTHS), strength, rows=1)
    fresh = torch.cat([torch.arange(n) == 0 for n in LENGTHS])
    for found, wanted in zip(results(form, tensors, fresh), of_images(tensors), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-10 * (1 + wanted.abs().max().item()), rtol=0)


def test_the_convolution_of_a_mixer_sees_its_own_image() -> None:
    for width in (1, 2, 3, 4):
        layer, x = Mamba(8, 4, width, 2, "auto"), torch.randn(sum(LENGTHS), 8)
        layer.initialise(Draw(layer), 1)
        positions = torch.cat([torch.arange(n) for n in LENGTHS])
        alone = torch.cat([layer(image[None])[0] for image in x.split(LENGTHS)])
        torch.testing.assert_close(layer(x, positions), alone)


def test_the_kernel_of_mamba_ssm_is_told_of_images_by_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a kernel that does what the package says of its own."""

    def kernel(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        state, found = torch.zeros(*u.shape[:2], a.shape[1], dtype=u.dtype), list[Tensor]()
        for t in range(u.shape[2]):
            new = (delta[:, :, t] * u[:, :, t])[..., None] * b[:, None, :, t]
            state = (delta[:, :, t, None] * a).exp() * state + new
            found.append((state * c[:, None, :, t]).sum(-1))
        return torch.stack(found, dim=2)

    package = SimpleNamespace(selective_scan_fn=kernel)
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops.selective_scan_interface", package)
    monkeypatch.setattr("genfound.layers.ssm.choose_form", lambda form, device: form)
    tensors = [x.float() for x in given(sum(LENGTHS), rows=1)]
    tensors[1][..., 5] = -200.0  # a step of 0
    fresh = torch.cat([torch.arange(n) == 0 for n in LENGTHS])
    for found, wanted in zip(results("mamba_ssm", tensors, fresh), of_images(tensors), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5 * (1 + wanted.abs().max().item()), rtol=0)


def test_strong_decays_stay_finite_in_float32() -> None:
    tensors = [x.float() for x in given(300, 20.0)]
    assert (softplus(tensors[1]).amax(2)[..., None] * tensors[3]).min() < -1000  # whose exp is 0
    for found, wanted in zip(results("chunked", tensors), results("reference", tensors), strict=True):
        assert found.isfinite().all()
        torch.testing.assert_close(found, wanted, atol=1e-5 * wanted.abs().max().item(), rtol=0)


def test_the_written_gradient_is_that_of_differences() -> None:
    assert torch.autograd.gradcheck(FORMS["chunked"], [x.requires_grad_() for x in given(19)])


def test_nothing_as_large_as_the_states_is_kept() -> None:
    tensors, sizes = [x.float().requires_grad_() for x in given(256, states=64)], list[int]()
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x)
    with hooks:
        selective_scan(*tensors, "chunked")
    assert max(sizes) <= 2 * 64 * 256 < 2 * 6 * 256 * 64


@pytest.mark.gpu
def test_the_kernel_of_mamba_ssm_gives_what_the_sequence_gives() -> None:
    pytest.importorskip("mamba_ssm")
    tensors = [x.float().cuda() for x in given(300, channels=64, states=16)]
    for found, wanted in zip(results("mamba_ssm", tensors), results("reference", tensors), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-4 * wanted.abs().max().item(), rtol=0)


def best(run: Callable[[], object], times: int) -> float:
    found = []
    for _ in range(times):
        begin = time.thread_time()
        run()
        found.append(time.thread_time() - begin)
    return min(found)


@pytest.mark.slow
def test_chunks_are_much_faster() -> None:
    """At 1,024 tokens of 64 channels on the CPU: 3 times in a forward pass, 4 times with the backward pass."""
    tensors = [x.float() for x in given(1024, rows=1, channels=64, states=16)]

    def step(form: str) -> None:
        selective_scan(*tensors, form)

    def train(form: str) -> None:
        results(form, tensors)

    for run, factor in ((step, 3), (train, 4)):
        run("chunked")
        slow, fast = (best(functools.partial(run, form), n) for form, n in (("reference", 3), ("chunked", 10)))
        assert slow / fast > factor


def test_a_mixer_begins_as_published() -> None:
    layer = Mamba(32, 16, 3, 2, "auto")
    layer.initialise(Draw(layer), 4)
    assert torch.equal(layer.D, torch.ones(64))
    torch.testing.assert_close(layer.A_log.exp(), torch.arange(1.0, 17).expand(64, -1))
    steps = softplus(layer.dt_proj.bias)
    assert steps.min() >= 0.99e-3 and 0.05 < steps.max() <= 0.1001
    assert layer.dt_proj.weight.abs().max() <= 2**-0.5
    bound = 1 / math.sqrt(64 * 4)
    assert 0.9 * bound < layer.out_proj.weight.abs().max() <= bound


def test_what_cannot_run_is_named() -> None:
    assert choose_form("auto", "cpu") == "chunked"
    with pytest.raises(ValueError, match=r"^model.recurrence=fast is unknown; choose one of auto, reference, chunked"):
        choose_form("fast", "cpu")
    with pytest.raises(ValueError, match=r"^model.recurrence=mamba_ssm needs the package mamba-ssm and a CUDA device"):
        choose_form("mamba_ssm", "cpu")
