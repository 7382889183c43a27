"""Whether the arithmetic of this machine is right and fast: bf16, attention, compiled blocks, experts, recurrences."""

import functools
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from genfound import build
from genfound.config import compose
from genfound.layers import gla, ssm
from genfound.layers.attention import packed_attention
from genfound.layers.expert_kernels import KERNELS
from genfound.layouts import Packed
from genfound.runtime.devices import synchronize
from genfound.tokenizers import LatentSpec

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""Relative errors that rounding explains."""

Outcome = Sequence[Tensor]


def products_per_second(dtype: torch.dtype, device: torch.device) -> float:
    """Products of two square matrices in a second."""
    side, repeats = (512, 5) if device.type == "cpu" else (4096, 20)
    a = torch.ones(side, side, dtype=dtype, device=device)
    for count in (1, repeats):  # the first one may load a library
        synchronize(device)
        begin = time.perf_counter()
        for _ in range(count):
            a @ a
        synchronize(device)
    return repeats / (time.perf_counter() - begin)


def bf16_error(device: torch.device) -> float:
    """Relative error of a product in bf16."""
    a, b = (_normal(256, 256, seed=seed).to(device) for seed in (0, 1))
    return _error([a.bfloat16() @ b.bfloat16()], [a @ b])


def attention_error(backend: str, device: torch.device, dtype: torch.dtype) -> float:
    """Relative error of output and gradients of a backend against `loop`, of that against a mask over all tokens."""
    ends = torch.tensor([0, 37, 101, 165, 165, 256], dtype=torch.int32, device=device)
    inputs = [_normal(256, 4, 64, seed=seed).to(device, dtype) for seed in range(3)]
    row = torch.searchsorted(ends[1:], torch.arange(256, device=device, dtype=torch.int32), right=True)

    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (a.float().transpose(0, 1) for a in (q, k, v))
        allowed = row[:, None] == row
        return nn.functional.scaled_dot_product_attention(q, k, v, allowed).transpose(0, 1).to(inputs[0].dtype)

    own, loop = (
        functools.partial(packed_attention, cu_seqlens=ends, max_seqlen=91, backend=name) for name in (backend, "loop")
    )
    return _error(_with_gradients(own, inputs), _with_gradients(masked if backend == "loop" else loop, inputs))


def experts_error(device: torch.device, dtype: torch.dtype) -> float:
    """Relative error of output and gradients between the two forms of the experts, one of which has no tokens."""
    ends = torch.tensor([32, 32, 64, 96], dtype=torch.int32, device=device)
    shapes = ((96, 64), (4, 256, 64), (4, 64, 128))
    inputs = [_normal(*shape, seed=seed).to(device, dtype) for seed, shape in enumerate(shapes)]
    forms = (lambda rows, *weights, form=form: form(rows, ends, *weights) for form in KERNELS.values())
    one, other = (_with_gradients(form, inputs) for form in forms)
    return _error(one, other)


def recurrence_errors(device: torch.device) -> Iterator[tuple[str, str, float]]:
    """Model, form that `model.recurrence=auto` takes, relative error of output and gradients against the reference."""
    q, k, v, g = (_normal(1, 100, 2, 32, seed=seed).to(device) for seed in range(4))
    form = gla.choose_form("auto", device.type, 32)
    forms = (functools.partial(gla.gated_linear_attention, form=name) for name in (form, "reference"))
    yield "DiG", form, _error(*(_with_gradients(own, [q, k, v, nn.functional.logsigmoid(g)]) for own in forms))
    shapes = ((1, 8, 100), (1, 8, 100), (1, 8, 100), (8, 4), (1, 4, 100), (1, 4, 100), (8,), (8,))
    inputs = [_normal(*shape, seed=seed).to(device) for seed, shape in enumerate(shapes)]
    inputs[3] = -inputs[3].exp()
    form = ssm.choose_form("auto", device.type)
    forms = (functools.partial(ssm.selective_scan, form=name) for name in (form, "reference"))
    yield "DiM", form, _error(*(_with_gradients(own, inputs) for own in forms))


def compiled_block(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Seconds to compile a block of NiT for training, and the relative error of its output and gradients."""
    net = build.net(compose.compose("train", ["model=nit_tiny", "model.depth=1"]), LatentSpec(3, 1), num_classes=10)
    for seed, parameter in enumerate(net.parameters()):  # those that begin as zeros would hide the block
        parameter.data = 0.05 * _normal(*parameter.shape, seed=seed)
    net.to(device).train()
    images = [_normal(3, *size, seed=seed) for seed, size in enumerate([(16, 16), (12, 20)])]
    batch = Packed(2).to_batch(images, torch.tensor([1, 2])).to(device)
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]

    def step() -> Outcome:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            output = net(batch, torch.tensor([0.3, 0.6], device=device))
        return [output.detach(), *torch.autograd.grad(output.float().square().sum(), trained)]

    eager = step()
    net.compile_blocks()
    begin = time.perf_counter()
    compiled = step()
    synchronize(device)
    return time.perf_counter() - begin, _error(compiled, eager)


def _with_gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Outcome:
    leaves = [a.detach().requires_grad_() for a in inputs]
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, _normal(*output.shape, seed=9).to(output))]


def _error(found: Outcome, expected: Outcome) -> float:
    """The largest relative error among tensors, in the norm of each; infinite where one is not finite."""
    pairs = [(a.float(), b.float()) for a, b in zip(found, expected, strict=True)]
    worst = max(float((a - b).norm() / b.norm().clamp(min=1e-12)) for a, b in pairs)
    return worst if all(bool(a.isfinite().all()) for a, _ in pairs) else float("inf")


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
