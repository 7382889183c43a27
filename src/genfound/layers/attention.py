"""Attention inside each image of a packed sequence: one signature, several kernels.

Every backend takes q, k, v of shape (T, H, d) and the row bounds `cu_seqlens` (B + 1,); token i attends to
the tokens of its own row, or of the row of the same number in another sequence of S tokens (cross-attention).
`loop` is the reference that all others are tested against.

Legend: T packed tokens, S packed tokens of the other sequence, H heads, d head size.
"""

import functools
import importlib.util
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad, scaled_dot_product_attention

from genfound.batch import Batch

Backend = Callable[..., Tensor]
"""Of q, k, v, cu_seqlens, max_seqlen and, for cross-attention, `Keys`."""

FLEX_BLOCK = 128
"""Rows and columns of a block of a `BlockMask`."""


class Keys(NamedTuple):
    """The rows of another packed sequence, (S, H, d), whose tokens are attended to; its tail may be of no row."""

    cu_seqlens: Tensor  # (B + 1,) int32; a row is empty where that of the queries is, and only there
    max_seqlen: int
    block_mask: BlockMask | None = None


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    backend: str,
    block_mask: BlockMask | None = None,
    keys: Keys | None = None,
) -> Tensor:
    """Softmax attention within each row of a packed sequence, (T, H, d) in the dtype of v.

    Args:
        q, k, v: (T, H, d); with `keys` k and v are (S, H, d).
        cu_seqlens: (B + 1,) int32, rows begin and end here; rows may be empty.
        max_seqlen: host bound on the length of a row.
        backend: a name of `BACKENDS`, or `auto` for the best one that runs here.
        block_mask: what `with_block_mask` made for `flex`, which otherwise makes one in each call.
        keys: whose tokens k and v are; `None`: those of the queries.
    """
    name = choose_backend(backend, q.device.type, v.dtype)
    if keys is not None:
        return BACKENDS[name](q, k, v, cu_seqlens, max_seqlen, keys).to(v.dtype)
    if block_mask is not None:
        return _flex(q, k, v, cu_seqlens, max_seqlen, block_mask=block_mask).to(v.dtype)
    return BACKENDS[name](q, k, v, cu_seqlens, max_seqlen).to(v.dtype)


def sdpa(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Softmax attention of rows of equal length; on the CPU in float32, which is faster there than bfloat16.

    q, k, v are (B, H, N, d); `allowed` broadcasts to (B, H, N, N), True where a query may see a key.
    """
    if q.device.type != "cpu":
        return scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, allowed)
    with torch.autocast("cpu", enabled=False):
        return scaled_dot_product_attention(q.float(), k.float(), v.float(), allowed).to(v.dtype)


def with_block_mask(batch: Batch, tokens: Tensor, backend: str) -> Batch:
    """The batch with the mask that `flex` needs, for all blocks of one forward pass; as it is for other backends.

    The tokens (T, D) have the dtype of the values that will be mixed; only a packed batch has a mask.
    """
    if batch.image_of is None or choose_backend(backend, tokens.device.type, tokens.dtype) != "flex":
        return batch
    return replace(batch, block_mask=document_mask(batch.image_of))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def choose_backend(backend: str, device: str, dtype: torch.dtype) -> str:
    """The backend that will run; `auto` takes the first available one. Decided once."""
    available = available_backends(device, dtype)
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"model.attention={backend} is unknown; choose one of auto, {', '.join(BACKENDS)}")
    if backend not in ("auto", *available):
        listed = ", ".join(available)
        raise ValueError(f"model.attention={backend} cannot run on {device} in {dtype}; available: {listed}")
    return available[0] if backend == "auto" else backend


@functools.cache
def available_backends(device: str, dtype: torch.dtype) -> tuple[str, ...]:
    """Backends that run for this device and dtype, best first."""
    return tuple(name for name, lack in lacking(device, dtype).items() if not lack)


def lacking(device: str, dtype: torch.dtype) -> dict[str, str]:
    """What each backend lacks to run for this device and dtype, best first; empty where it runs.

    The flash kernels are made for 16 bits from capability 8.0. `flex` is never the best: where they do not run, in
    float32, its kernels need a compiler and may not fit the shared memory of a card, and no measurement shows them
    faster than `loop`, which runs anywhere.
    """
    capability = torch.cuda.get_device_capability() if device == "cuda" and torch.cuda.is_available() else (0, 0)

    def lack(least: tuple[int, int], module: str, bits: str = "") -> str:
        if capability < least:
            return f"a CUDA device of capability {least[0]}.{least[1]}"
        if bits and dtype not in (torch.float16, torch.bfloat16):
            return bits
        return "" if _installed(module) else f"the package {module}"

    return {
        "flash": lack((8, 0), "flash_attn", bits="bf16"),
        "varlen": lack((8, 0), "torch.nn.attention.varlen", bits="bf16"),
        "loop": "",
        "flex": lack((7, 0), "triton"),
    }


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _loop(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, keys: Keys | None = None) -> Tensor:
    """SDPA per row in float32; neighbouring rows of equal lengths share one call."""
    rows = _loop_op if torch.compiler.is_compiling() else _loop_rows
    with torch.autocast(q.device.type, enabled=False):  # which would cast to bf16, 2x slower on short rows
        return rows(q.float(), k.float(), v.float(), cu_seqlens, None if keys is None else keys.cu_seqlens)


def _loop_rows(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_keys: Tensor | None) -> Tensor:
    rows = _rows(cu_seqlens, [q], [k, v], cu_keys)
    return _packed([scaled_dot_product_attention(a, b, c) for a, b, c in rows])


def _rows(
    cu_seqlens: Tensor, queries: list[Tensor], keys: list[Tensor], cu_keys: Tensor | None = None
) -> list[tuple[Tensor, ...]]:
    """Runs of rows of equal lengths: each tensor (T, H, d) or (S, H, d) -> (rows, H, n, d), queries first."""
    bounds = torch.stack([cu_seqlens, cu_seqlens if cu_keys is None else cu_keys], dim=1)
    lengths = [pair for pair in bounds.diff(dim=0).tolist() if pair[0] > 0]
    runs = [(pair, len(list(same))) for pair, same in itertools.groupby(lengths)]
    split = [_split(a, [(pair[0], rows) for pair, rows in runs]) for a in queries]
    split += [_split(a, [(pair[1], rows) for pair, rows in runs]) for a in keys]
    return list(zip(*split, strict=True))


def _split(a: Tensor, runs: list[tuple[int, int]]) -> list[Tensor]:
    """(T, H, d) -> for each run of rows of n tokens (rows, H, n, d)."""
    sizes = [n * rows for n, rows in runs]
    parts = a.split([*sizes, len(a) - sum(sizes)])  # whose tail is of no row
    return [part.unflatten(0, (rows, n)).transpose(1, 2) for part, (n, rows) in zip(parts, runs, strict=False)]


def _packed(runs: list[Tensor]) -> Tensor:
    """The inverse of `_rows` for one tensor."""
    return torch.cat([run.transpose(1, 2).flatten(0, 1) for run in runs])


@torch.library.custom_op("genfound::packed_attention_loop", mutates_args=())
def _loop_op(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_keys: Tensor | None) -> Tensor:
    """`_loop_rows` as one opaque operation, so that a compiled block has no graph break."""
    return _loop_rows(q, k, v, cu_seqlens, cu_keys).contiguous()


@_loop_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_keys: Tensor | None) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def _loop_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _loop_backward(ctx, grad):  # type: ignore[no-untyped-def]
    return *_loop_grad_op(grad.contiguous(), *ctx.saved_tensors), None, None


@torch.library.custom_op("genfound::packed_attention_loop_grad", mutates_args=())
def _loop_grad_op(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_keys: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of softmax attention, written out: autograd does not reach inside an operation."""
    grads = []
    scale = q.shape[-1] ** -0.5
    for a, g, b, c in _rows(cu_seqlens, [q, grad], [k, v], cu_keys):  # (rows, H, n, d)
        weights = torch.softmax(scale * a @ b.mT, dim=-1)  # (rows, H, n, m)
        by_weight = g @ c.mT
        by_score = scale * weights * (by_weight - (by_weight * weights).sum(-1, keepdim=True))
        grads.append((by_score @ b, by_score.mT @ a, weights.mT @ g))
    found = (_packed(list(runs)) for runs in zip(*grads, strict=True))
    dq, dk, dv = (pad(d, (0, 0, 0, 0, 0, len(a) - len(d))) for d, a in zip(found, (q, k, v), strict=True))
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


@_loop_grad_op.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_keys: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


_loop_op.register_autograd(_loop_backward, setup_context=_loop_setup)


def _varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, keys: Keys | None = None) -> Tensor:
    """PyTorch's own variable-length flash attention (CUDA, 16 bit)."""
    from torch.nn.attention.varlen import varlen_attn

    k, v, cu_keys, max_keys = _without_tail(k, v, cu_seqlens, max_seqlen, keys)
    out = varlen_attn(q.to(v.dtype), k.to(v.dtype), v, cu_seqlens, cu_keys, max_seqlen, max_keys)
    assert isinstance(out, Tensor)
    return out


def _flash(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, keys: Keys | None = None) -> Tensor:
    """The flash-attn package (CUDA, 16 bit)."""
    from flash_attn import flash_attn_varlen_func

    k, v, cu_keys, max_keys = _without_tail(k, v, cu_seqlens, max_seqlen, keys)
    return flash_attn_varlen_func(
        q.to(v.dtype), k.to(v.dtype), v, cu_seqlens, cu_keys, max_seqlen, max_keys,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip


def _without_tail(
    k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, keys: Keys | None
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Keys, values and their rows; a tail of no row gets no gradient, for which the kernels leave chance numbers."""
    if keys is None:
        return k, v, cu_seqlens, max_seqlen
    tail = torch.arange(len(k), device=k.device)[:, None, None] >= keys.cu_seqlens[-1]
    return k.masked_fill(tail, 0), v.masked_fill(tail, 0), keys.cu_seqlens, keys.max_seqlen


def _flex(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, keys: Keys | None = None,
    block_mask: BlockMask | None = None,
) -> Tensor:  # fmt: skip
    """FlexAttention (CUDA)."""
    if keys is not None:
        block_mask = keys.block_mask
    if block_mask is None:
        of_keys = None if keys is None else _row_of_each(keys.cu_seqlens, len(k))
        block_mask = document_mask(_row_of_each(cu_seqlens, len(q)), of_keys)
    q, k, v = (a.to(v.dtype).transpose(0, 1)[None] for a in (q, k, v))  # (1, H, T, d)
    kernel: Any = flex_attention if torch.compiler.is_compiling() else _compiled_flex()
    return kernel(q, k, v, block_mask=block_mask)[0].transpose(0, 1)


def _row_of_each(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """(T,) the number of each token's row."""
    return torch.searchsorted(cu_seqlens, torch.arange(tokens, device=cu_seqlens.device), right=True)


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(flex_attention)


def document_mask(row: Tensor, of_keys: Tensor | None = None) -> BlockMask:
    """The mask of a pack from the row of each token (T,), which never falls; without waiting for the device.

    A block of queries meets those blocks of keys whose rows overlap its own; where all are of one row, no token
    is looked at. `of_keys` (S,) are the rows of the keys, where these are another sequence.
    """
    rows = row, row if of_keys is None else of_keys
    (first, last, one), (first_k, last_k, one_k) = map(_block_rows, rows)
    meet = (first[:, None] <= last_k) & (first_k <= last[:, None])  # (blocks, blocks of keys)
    full = meet & one[:, None] & one_k

    def same_row(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return rows[0][i] == rows[1][j]

    lengths = len(rows[0]), len(rows[1])
    return BlockMask.from_kv_blocks(*_listed(meet & ~full), *_listed(full), FLEX_BLOCK, same_row, seq_lengths=lengths)


def _block_rows(row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each block of tokens: its first and last row, and whether all of it is of one row."""
    begins = torch.arange(0, len(row), FLEX_BLOCK, device=row.device)
    ends = begins + FLEX_BLOCK
    first, last = row[begins], row[(ends - 1).clamp(max=len(row) - 1)]  # (blocks,)
    return first, last, (first == last) & (ends <= len(row))


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks (n, n) -> how many are set in each line (1, 1, n), and the numbers of these first (1, 1, n, n)."""
    numbers = blocks.int().argsort(dim=1, descending=True, stable=True)
    return blocks.sum(dim=1, dtype=torch.int32)[None, None], numbers.int()[None, None]


BACKENDS: dict[str, Backend] = {"loop": _loop, "varlen": _varlen, "flash": _flash, "flex": _flex}
