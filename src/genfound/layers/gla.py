"""Gated linear attention (arXiv 2312.06635): a recurrence over the tokens of each image, in one signature.

    S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T,    o_t = q_t S_t / sqrt(k),    S = 0 before the first token

Every form takes q, k (B, N, H, k), v (B, N, H, v) and logarithms of decays g <= 0 (B, N, H, k), and gives (B, N, H, v).
The tokens of a pack are one row, N = T, in which `Rows` tell where images begin. `reference` is what all others are
tested against.

Legend: B rows, N tokens of a row, H heads, k and v head sizes of keys and of values, C tokens of a chunk, n chunks,
c tokens of a part of a chunk, m = C / c.
"""

import functools
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, pad, silu

from genfound.batch import Batch
from genfound.config.checks import integer, number, one_of
from genfound.layers.adaln import autocast_off

CHUNK, PART = 64, 8
LOWEST = -120.0
"""Logarithm of the decay over a chunk down to which its factors, halves of it, are numbers of float32."""


class Rows(NamedTuple):
    """Where the images of a pack begin; to chunks, each of one image, their tokens are spread out."""

    cu_seqlens: Tensor  # (B + 1,)
    slots: Tensor  # (T,) of each token among all slots of the chunks
    fresh: Tensor  # (n,) 1 for a chunk with which an image begins, else 0; float

    @classmethod
    def of(cls, batch: Batch) -> "Rows | None":
        """Of a packed batch, with as many chunks as it may need at most; `None` for a dense one."""
        if batch.image_of is None or batch.cu_seqlens is None:
            return None
        chunks = (batch.cu_seqlens.diff() + CHUNK - 1) // CHUNK  # (B,)
        first = chunks.cumsum(0) - chunks
        fresh = torch.zeros(len(batch.image_of) // CHUNK + len(chunks) + 1, device=first.device)
        slots = first[batch.image_of] * CHUNK + batch.positions
        return cls(batch.cu_seqlens, slots, fresh.index_fill(0, first, 1.0)[:-1])


Form = Callable[[Tensor, Tensor, Tensor, Tensor, Rows | None], Tensor]


def gated_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, rows: Rows | None = None, form: str = "auto"
) -> Tensor:
    """The recurrence by a name of `FORMS`, or by the best one that runs here; (B, N, H, v) in the dtype of v.

    Sums are taken in float32, or in float64 if g is.
    """
    name = choose_form(form, q.device.type, min(q.shape[-1], v.shape[-1]))
    with autocast_off(q):
        return FORMS[name](q, k, v, g, rows).to(v.dtype)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def choose_form(form: str, device: str, head: int) -> str:
    """The form that will run for heads of at least this size."""
    one_of("model.recurrence", form, ("auto", *FORMS))
    runs = device == "cuda" and head >= 16 and _installed("fla")
    if form == "fla" and not runs:
        lack = "the package flash-linear-attention, a CUDA device and heads of at least 16 numbers"
        raise ValueError(f"model.recurrence=fla needs {lack}; choose auto")
    return ("fla" if runs else "chunked") if form == "auto" else form


@functools.cache
def _installed(module: str) -> bool:
    return find_spec(module) is not None


def _reference(q: Tensor, k: Tensor, v: Tensor, g: Tensor, rows: Rows | None) -> Tensor:
    """Token by token."""
    if rows is not None:
        lengths = [n for n in rows.cu_seqlens.diff().tolist() if n]
        images = zip(*(x.split(lengths, dim=1) for x in (q, k, v, g)), strict=True)
        return torch.cat([_reference(a, b, c, d, None) for a, b, c, d in images], dim=1)
    q, k, v = q.to(g.dtype) * q.shape[-1] ** -0.5, k.to(g.dtype), v.to(g.dtype)
    state, found = q.new_zeros(len(q), *q.shape[2:], v.shape[-1]), []  # (B, H, k, v)
    for q_t, k_t, v_t, decay in zip(*(x.unbind(1) for x in (q, k, v, g.exp())), strict=True):
        state = decay[..., None] * state + k_t[..., None] * v_t[..., None, :]
        found.append((q_t[..., None, :] @ state)[..., 0, :])
    return torch.stack(found, dim=1)


def _chunked(q: Tensor, k: Tensor, v: Tensor, g: Tensor, rows: Rows | None) -> Tensor:
    """Chunk by chunk: products of matrices within them, and a state from one to the next.

    Where decays are too strong for one factor of the query and one of the key, and where to know would break a graph
    or wait for the device, weights are made by `_stable`.
    """
    tokens = q.shape[1]
    q, k, v, g = (_in_chunks(x.to(g.dtype), rows) for x in (q, k, v, g))
    q = q * q.shape[-1] ** -0.5
    b = g.cumsum(dim=-2)  # (B, H, n, C, k), to the end of each token
    last = b[..., -1:, :]
    if g.is_cuda or torch.compiler.is_compiling() or (last.detach() < LOWEST).any():
        weights, seen, kept = _stable(q, k, b), q * b.exp(), k * (last - b).exp()
    else:
        middle = last / 2
        up, down = q * (b - middle).exp(), k * (middle - b).exp()
        weights, half = (up @ down.mT).tril(), middle.exp()
        seen, kept = up * half, down * half
    states = _carried(kept.mT @ v, last.exp().mT, rows)
    out = (weights @ v + seen @ states).flatten(2, 3).transpose(1, 2)  # (B, n C, H, v)
    return out[:, :tokens] if rows is None else out.index_select(1, rows.slots)


def _in_chunks(x: Tensor, rows: Rows | None) -> Tensor:
    """(B, N, H, d) -> (B, H, n, C, d), with zeros after the tokens of a row or image."""
    if rows is None:
        x = pad(x, (0, 0, 0, 0, 0, -x.shape[1] % CHUNK))
    else:
        x = x.new_zeros(1, len(rows.fresh) * CHUNK, *x.shape[2:]).index_copy(1, rows.slots, x)
    return x.transpose(1, 2).unflatten(2, (-1, CHUNK))


def _carried(added: Tensor, decay: Tensor, rows: Rows | None) -> Tensor:
    """The state before each chunk (B, H, n, k, v), from what each adds and by how much (B, H, n, k, 1) it decays."""
    if rows is not None:  # what an image begins with is nothing
        goes_on = (1 - pad(rows.fresh[1:], (0, 1))).to(added.dtype)[:, None, None]
        added, decay = added * goes_on, decay * goes_on
    state, states = torch.zeros_like(added[:, :, 0]), []
    for new, left in zip(added.unbind(2), decay.unbind(2), strict=True):
        states.append(state)
        state = torch.addcmul(new, left, state)
    return torch.stack(states, dim=2)


def _stable(q: Tensor, k: Tensor, b: Tensor) -> Tensor:
    """Weights (..., C, C) of each value in each output, without an exponent above 0.

    Queries of a part of a chunk and keys before it meet at the first token of the part; those of one part in pairs.
    """
    parts = [x.unflatten(-2, (-1, PART)) for x in (q, k, b)]  # (..., m, c, k)
    q, b_q, first = parts[0], parts[2], parts[2][..., :1, :]
    place = torch.arange(CHUNK, device=b.device).view(-1, PART)  # (m, c)
    before = place.flatten() < place[:, :1]  # (m, C)
    fall = (first - b[..., None, :, :]).masked_fill(~before[..., None], -torch.inf)  # (..., m, C, k)
    earlier = (q * (b_q - first).exp()) @ (k[..., None, :, :] * fall.exp()).mT  # (..., m, c, C)
    future = torch.ones(PART, PART, dtype=torch.bool, device=b.device).triu(1)[..., None]
    fall = (b_q[..., :, None, :] - b_q[..., None, :, :]).masked_fill(future, -torch.inf)  # (..., m, c, c, k)
    own = torch.einsum("...tk,...sk,...tsk->...ts", q, parts[1], fall.exp())  # (..., m, c, c)
    spread = own[..., None, :] * torch.eye(len(place), device=b.device, dtype=b.dtype)[:, None, :, None]
    return (earlier + spread.flatten(-2)).flatten(-3, -2)


def _fla(q: Tensor, k: Tensor, v: Tensor, g: Tensor, rows: Rows | None) -> Tensor:
    """The kernels of the package flash-linear-attention (CUDA), which count empty rows wrongly."""
    kernels = import_module("fla.ops.gla")  # by its name, which diffusers would ask for in a folder
    bounds = None if rows is None else rows.cu_seqlens.unique_consecutive().long()
    out, _ = kernels.chunk_gla(q.to(v.dtype), k.to(v.dtype), v, g, scale=q.shape[-1] ** -0.5, cu_seqlens=bounds)
    assert isinstance(out, Tensor)
    return out


FORMS: dict[str, Form] = {"reference": _reference, "chunked": _chunked, "fla": _fla}


class GatedLinearAttention(nn.Module):
    """Heads of the recurrence with gates from a bottleneck, a norm of each head and an output gate.

    Args:
        width: D.
        heads: H.
        key_width, value_width: of all heads together.
        gate_rank: of the matrix that makes the gates.
        gate_normalizer: of their logarithms; larger ones forget less.
        recurrence: a name of `FORMS`, or `auto`.
    """

    def __init__(
        self, width: int, heads: int, key_width: int, value_width: int, gate_rank: int, gate_normalizer: float,
        recurrence: str,
    ) -> None:  # fmt: skip
        super().__init__()
        integer("model.gate_rank", gate_rank, 1)
        self.heads, self.gate_normalizer = heads, number("model.gate_normalizer", gate_normalizer, 0, above=True)
        self.recurrence = one_of("model.recurrence", recurrence, ("auto", *FORMS))
        self.q_proj = nn.Linear(width, key_width, bias=False)
        self.k_proj = nn.Linear(width, key_width, bias=False)
        self.v_proj = nn.Linear(width, value_width, bias=False)
        self.g_proj = nn.Linear(width, value_width, bias=False)
        self.gk_proj = nn.Sequential(nn.Linear(width, gate_rank, bias=False), nn.Linear(gate_rank, key_width))
        self.o_proj = nn.Linear(value_width, width, bias=False)
        self.g_norm_swish_gate = nn.RMSNorm(value_width // heads, eps=1e-6)

    def form_on(self, device: str) -> str:
        """The form that will run; a ValueError if it cannot."""
        smallest = min(self.k_proj.out_features, self.v_proj.out_features) // self.heads
        return choose_form(self.recurrence, device, smallest)

    @property
    def flops_per_token(self) -> int:
        """Of the recurrence: two products of a key and a value, or what stands for them, of each head."""
        return 4 * self.k_proj.out_features * self.v_proj.out_features // self.heads

    def forward(self, x: Tensor, rows: Rows | None) -> Tensor:
        """Dense (B, N, D), or packed (T, D) with their rows, -> the same shape."""
        row = x if rows is None else x[None]
        gates = logsigmoid(self.gk_proj(row).float()) / self.gate_normalizer
        parts = (self.q_proj(row), self.k_proj(row), self.v_proj(row), gates)
        q, k, v, g = (part.unflatten(2, (self.heads, -1)) for part in parts)
        out, gate = gated_linear_attention(q, k, v, g, rows, self.recurrence), self.g_proj(row)  # (B, N, H, v)
        with autocast_off(x):
            out = self.g_norm_swish_gate(out.float()) * silu(gate.float()).view_as(out)
        return self.o_proj(out.flatten(2)).view_as(x)
