"""The selective state-space model of Mamba (arXiv 2312.00752): a recurrence over tokens, in one signature.

    h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t,    y_t = h_t C_t + D u_t,    h = 0 before the first token

with delta = softplus(delta + bias), and the output y * SiLU(z). Every form takes u, delta, z (B, E, L), A (E, N), B and
C (B, N, L), D and bias (E,), and gives (B, E, L). `reference` is what all others are tested against.

A pack is one image of L tokens, of which `fresh` says with which an image begins: there nothing is left of the state.

Legend: B images, L tokens, D width, E channels of the recurrence, N states of a channel, n chunks of c tokens.
"""

import functools
import importlib.util
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad, silu, softplus

from genfound.config.checks import integer, one_of
from genfound.layers.adaln import autocast_off
from genfound.layers.initial import Draw

Form = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]

RESET = 1e15
"""A step after which nothing is left of a state in float32, unless A is above -1e-13."""


def selective_scan(
    u: Tensor, delta: Tensor, z: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, bias: Tensor,
    form: str = "auto", fresh: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The recurrence by a name of `FORMS`, or by the best one that runs here; (B, E, L) in the dtype of u.

    States are kept in float32, or in float64 if A is. `fresh` (L,) is true where an image of a pack begins.
    """
    with autocast_off(u):
        return FORMS[choose_form(form, u.device.type)](u, delta, z, a, b, c, d, bias, fresh).to(u.dtype)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def choose_form(form: str, device: str) -> str:
    """The form that will run."""
    one_of("model.recurrence", form, ("auto", *FORMS))
    runs = device == "cuda" and _installed("mamba_ssm")
    if form == "mamba_ssm" and not runs:
        raise ValueError("model.recurrence=mamba_ssm needs the package mamba-ssm and a CUDA device; choose auto")
    return ("mamba_ssm" if runs else "chunked") if form == "auto" else form


@functools.cache
def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _with(scan: Callable[..., Tensor]) -> Form:
    """A form from a recurrence of (delta, delta u, A, B, C) alone."""

    def form(
        u: Tensor, delta: Tensor, z: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, bias: Tensor,
        fresh: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        u, delta, z, b, c = (x.to(a.dtype).contiguous() for x in (u, delta, z, b, c))
        delta = softplus(delta + bias[:, None])
        decay = delta if fresh is None else delta.masked_fill(fresh, RESET)
        return torch.addcmul(scan(decay, delta * u, a, b, c), d[:, None], u) * silu(z)

    return form


def _reference(delta: Tensor, given: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Token by token."""
    state, found = torch.zeros_like(delta[:, :, :1] * a), []  # (B, E, N)
    for step, new, b_t, c_t in zip(*(x.unbind(2) for x in (delta, given, b, c)), strict=True):
        state = (step[..., None] * a).exp() * state + new[..., None] * b_t[:, None]
        found.append((state @ c_t[..., None])[..., 0])
    return torch.stack(found, dim=2)


def _chunked(delta: Tensor, given: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """All chunks at once, token by token: from nothing, then, when the state before each is known, once more.

    No factor is above 1, and nothing of the size of the states is kept for the backward pass, which makes them again.
    """
    return _scan(delta, given, a, b, c)[0]


@torch.library.custom_op("genfound::selective_scan", mutates_args=())
def _scan(delta: Tensor, given: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """What comes out of the states (B, E, L), and the state before each chunk; one opaque operation to a compiler."""
    steps, new, b_t, c_t = (_chunks(x) for x in (delta, given, b, c))
    decays = (steps[..., None] * a).exp_()  # (c, B, n, E, N)
    end = torch.zeros_like(decays[0])
    for decay, x, y in zip(decays, new[..., None], b_t[..., None, :], strict=True):
        end = torch.addcmul(x * y, decay, end)
    start = state = _carry(end, (steps.sum(0)[..., None] * a).exp_())
    out = torch.empty_like(steps)
    for i, (decay, x, y) in enumerate(zip(decays, new[..., None], b_t[..., None, :], strict=True)):
        state = torch.addcmul(x * y, decay, state)
        torch.matmul(state, c_t[i, ..., None], out=out[i, ..., None])
    return _joined(out, delta.shape[2]), start


@_scan.register_fake
def _(delta: Tensor, given: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    chunks = -(-delta.shape[2] // _size(delta.shape[2]))
    return delta.new_empty(delta.shape), delta.new_empty(len(delta), chunks, *a.shape)


@torch.library.custom_op("genfound::selective_scan_grad", mutates_args=())
def _scan_grad(
    grad: Tensor, delta: Tensor, given: Tensor, a: Tensor, b: Tensor, c: Tensor, start: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of delta, delta u, A, B and C: the recurrence of the adjoint, backwards, in the same chunks."""
    steps, new, b_t, c_t, out = (_chunks(x) for x in (delta, given, b, c, grad))
    decays = (steps[..., None] * a).exp_()  # (c, B, n, E, N)
    states = [start]  # before each token, and after the last one
    own = torch.zeros_like(start)
    for decay, x, y in zip(decays, new[..., None], b_t[..., None, :], strict=True):
        states.append(torch.addcmul(x * y, decay, states[-1]))
    for i in reversed(range(len(steps))):
        own = torch.addcmul(own, out[i, ..., None], c_t[i, ..., None, :]).mul_(decays[i])
    # What later chunks say of the last state of each.
    after = _carry(own.flip(1), (steps.sum(0)[..., None] * a).exp_().flip(1)).flip(1)
    d_delta, d_given, d_b, d_c = (torch.empty_like(x) for x in (steps, new, b_t, c_t))
    d_a = torch.zeros_like(start)
    for i in reversed(range(len(steps))):
        adjoint = torch.addcmul(after, out[i, ..., None], c_t[i, ..., None, :])
        d_given[i] = (adjoint @ b_t[i, ..., None])[..., 0]
        d_b[i] = (new[i, ..., None, :] @ adjoint)[..., 0, :]
        d_c[i] = (out[i, ..., None, :] @ states[i + 1])[..., 0, :]
        after = decays[i] * adjoint
        change = after * states[i]  # by delta A
        d_a.addcmul_(change, steps[i, ..., None])
        d_delta[i] = (change * a).sum(-1)
    d_delta, d_given, d_b, d_c = (_joined(x, delta.shape[2]) for x in (d_delta, d_given, d_b, d_c))
    return d_delta, d_given, d_a.sum((0, 1)), d_b, d_c


@_scan_grad.register_fake
def _(grad: Tensor, delta: Tensor, given: Tensor, a: Tensor, b: Tensor, c: Tensor, start: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (delta, given, a, b, c))


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs, output[1])


def _backward(ctx, grad, _):  # type: ignore[no-untyped-def]
    return _scan_grad(grad, *ctx.saved_tensors)


_scan.register_autograd(_backward, setup_context=_keep)


def _size(length: int) -> int:
    """Tokens of a chunk: a power of two near the root of all, found so that a compiler need not know their number."""
    size = 8
    while 2 * size**2 <= length:
        size *= 2
    return size


def _chunks(x: Tensor) -> Tensor:
    """(B, E, L) -> (c, B, n, E), with zeros after the last token."""
    size = _size(x.shape[2])
    return pad(x, (0, -x.shape[2] % size)).unflatten(2, (-1, size)).permute(3, 0, 2, 1).contiguous()


def _joined(x: Tensor, length: int) -> Tensor:
    """The inverse of `_chunks`."""
    return x.permute(1, 3, 2, 0).flatten(2)[..., :length].contiguous()


def _carry(ends: Tensor, decays: Tensor) -> Tensor:
    """What comes before each chunk, from what each adds to nothing and by how much it decays, (B, n, E, N)."""
    state, found = torch.zeros_like(ends[:, 0]), []
    for end, decay in zip(ends.unbind(1), decays.unbind(1), strict=True):
        found.append(state)
        state = torch.addcmul(end, decay, state)
    return torch.stack(found, dim=1)


def _mamba_ssm(
    u: Tensor, delta: Tensor, z: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, bias: Tensor, fresh: Tensor | None
) -> Tensor:
    """The kernel of the package mamba-ssm (CUDA)."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    u, delta, z, b, c = (x.contiguous() for x in (u, delta, z, b, c))
    if fresh is not None:
        return _with(functools.partial(_in_steps, selective_scan_fn))(u, delta, z, a, b, c, d, bias, fresh)
    out = selective_scan_fn(u, delta, a, b, c, d, z=z, delta_bias=bias, delta_softplus=True)
    assert isinstance(out, Tensor)
    return out


def _in_steps(kernel: Callable[..., Tensor], delta: Tensor, given: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """By a kernel of (delta, u, A, B, C), which multiplies delta and u itself."""
    return kernel(given / delta.clamp(min=torch.finfo(delta.dtype).tiny), delta, a, b, c)


FORMS: dict[str, Form] = {
    "reference": _with(_reference),
    "chunked": _with(_chunked),
    "mamba_ssm": _mamba_ssm,
}


class Mamba(nn.Module):
    """The mixer: a causal depth-wise convolution and the recurrence, of which all but A and D come from the tokens.

    Args:
        width: D.
        states: N.
        conv: tokens that the convolution sees.
        expand: E / D.
        recurrence: a name of `FORMS`, or `auto`.
    """

    def __init__(self, width: int, states: int, conv: int, expand: int, recurrence: str) -> None:
        super().__init__()
        for key, value in (("states", states), ("conv", conv), ("expand", expand)):
            integer(f"model.{key}", value, 1)
        channels, self.rank = width * expand, -(-width // 16)
        self.recurrence = one_of("model.recurrence", recurrence, ("auto", *FORMS))
        self.in_proj = nn.Linear(width, 2 * channels, bias=False)
        self.conv1d = nn.Conv1d(channels, channels, conv, groups=channels, padding=conv - 1)
        self.x_proj = nn.Linear(channels, self.rank + 2 * states, bias=False)
        self.dt_proj = nn.Linear(self.rank, channels)
        self.A_log, self.D = nn.Parameter(torch.empty(channels, states)), nn.Parameter(torch.empty(channels))
        self.out_proj = nn.Linear(channels, width, bias=False)

    def initialise(self, draw: Draw, blocks: int) -> None:
        """A = -(1 ... N), D = 1, steps from 0.001 to 0.1, and outputs smaller in a network of more blocks."""
        draw(_rising_, self.A_log)
        nn.init.ones_(self.D)
        draw(nn.init.uniform_, self.dt_proj.weight, a=-(self.rank**-0.5), b=self.rank**-0.5)
        draw(_steps_, self.dt_proj.bias)
        spread = (self.out_proj.in_features * blocks) ** -0.5
        draw(nn.init.uniform_, self.out_proj.weight, a=-spread, b=spread)

    def form_on(self, device: str) -> str:
        """The form that will run; a ValueError if it cannot."""
        return choose_form(self.recurrence, device)

    @property
    def flops_per_token(self) -> int:
        """Of the recurrence."""
        return 9 * self.A_log.numel()

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """(B, L, D), or a pack (L, D) with the position of each token in its image, -> the same shape."""
        row = x if positions is None else x[None]
        u, z = self.in_proj(row).mT.chunk(2, dim=1)  # (B, E, L) each
        u = silu(self.convolved(u, positions))
        states = self.A_log.shape[1]
        dt, b, c = self.x_proj(u.mT).split([self.rank, states, states], dim=2)
        delta = linear(dt, self.dt_proj.weight).mT  # its bias is added later, in float32
        fresh = None if positions is None else positions == 0
        with autocast_off(x):
            a, d, bias = -self.A_log.float().exp(), self.D.float(), self.dt_proj.bias.float()
            out = selective_scan(u, delta, z, a, b.mT, c.mT, d, bias, self.recurrence, fresh)
        return self.out_proj(out.mT).view_as(x)

    def convolved(self, u: Tensor, positions: Tensor | None) -> Tensor:
        """Each token (B, E, L) with those before it in its image."""
        if positions is None:
            return self.conv1d(u)[..., : u.shape[2]]
        assert self.conv1d.bias is not None
        out = self.conv1d.bias[:, None]
        for back, weight in enumerate(self.conv1d.weight.flatten(1).flip(1).unbind(1)):
            out = torch.addcmul(out, pad(u, (back, 0))[..., : u.shape[2]], weight[:, None] * (positions >= back))
        return out.to(u.dtype)


def _rising_(a_log: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Logarithms of 1 ... N in each row; nothing is drawn."""
    return a_log.copy_(torch.arange(1, a_log.shape[1] + 1).log())


def _steps_(bias: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Numbers whose softplus is log-uniform from 0.001 to 0.1."""
    step = nn.init.uniform_(bias, math.log(0.001), math.log(0.1), generator).exp().clamp(min=1e-4)
    return bias.copy_(step + (-torch.expm1(-step)).log())
