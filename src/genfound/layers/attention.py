"""Attention inside each image of a packed sequence: one signature, several kernels.

Every backend takes q, k, v of shape (T, H, d) and the row bounds `cu_seqlens` (B + 1,); token i attends to
the tokens of its own row. `loop` is the reference that all others are tested against.

Legend: T packed tokens, H heads, d head size.
"""

import functools
import importlib.util
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from genfound.batch import Batch

Backend = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]

FLEX_BLOCK = 128
"""Rows and columns of a block of a `BlockMask`."""


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    backend: str,
    block_mask: BlockMask | None = None,
) -> Tensor:
    """Softmax attention within each row of a packed sequence, (T, H, d) in the dtype of v.

    Args:
        q, k, v: (T, H, d).
        cu_seqlens: (B + 1,) int32, rows begin and end here; rows may be empty.
        max_seqlen: host bound on the length of a row.
        backend: a name of `BACKENDS`, or `auto` for the best one that runs here.
        block_mask: what `with_block_mask` made for `flex`, which otherwise makes one in each call.
    """
    name = choose_backend(backend, q.device.type, v.dtype)
    if block_mask is not None:
        return _flex(q, k, v, cu_seqlens, max_seqlen, block_mask).to(v.dtype)
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


def _loop(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """SDPA per row in float32; neighbouring rows of equal length share one call."""
    rows = _loop_op if torch.compiler.is_compiling() else _loop_rows
    with torch.autocast(q.device.type, enabled=False):  # which would cast to bf16, 2x slower on short rows
        return rows(q.float(), k.float(), v.float(), cu_seqlens)


def _loop_rows(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    return _packed([scaled_dot_product_attention(a, b, c) for a, b, c in _rows(cu_seqlens, q, k, v)])


def _rows(cu_seqlens: Tensor, *packed: Tensor) -> list[tuple[Tensor, ...]]:
    """Runs of rows of equal length: each tensor (T, H, d) -> (rows, H, n, d)."""
    lengths = [n for n in cu_seqlens.diff().tolist() if n > 0]
    runs = [(n, len(list(same))) for n, same in itertools.groupby(lengths)]
    split = zip(runs, *(a.split([n * rows for n, rows in runs]) for a in packed), strict=True)
    return [tuple(a.unflatten(0, (rows, n)).transpose(1, 2) for a in part) for (n, rows), *part in split]


def _packed(runs: list[Tensor]) -> Tensor:
    """The inverse of `_rows` for one tensor."""
    return torch.cat([run.transpose(1, 2).flatten(0, 1) for run in runs])


@torch.library.custom_op("genfound::packed_attention_loop", mutates_args=())
def _loop_op(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """`_loop_rows` as one opaque operation, so that a compiled block has no graph break."""
    return _loop_rows(q, k, v, cu_seqlens).contiguous()


@_loop_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    return torch.empty_like(v, memory_format=torch.contiguous_format)


def _loop_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _loop_backward(ctx, grad):  # type: ignore[no-untyped-def]
    q, k, v, cu_seqlens = ctx.saved_tensors
    return *_loop_grad_op(grad.contiguous(), q, k, v, cu_seqlens), None


@torch.library.custom_op("genfound::packed_attention_loop_grad", mutates_args=())
def _loop_grad_op(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of softmax attention, written out: autograd does not reach inside an operation."""
    grads = []
    scale = q.shape[-1] ** -0.5
    for a, b, c, g in _rows(cu_seqlens, q, k, v, grad):  # (rows, H, n, d)
        weights = torch.softmax(scale * a @ b.mT, dim=-1)  # (rows, H, n, n)
        by_weight = g @ c.mT
        by_score = scale * weights * (by_weight - (by_weight * weights).sum(-1, keepdim=True))
        grads.append((by_score @ b, by_score.mT @ a, weights.mT @ g))
    dq, dk, dv = (_packed(list(runs)) for runs in zip(*grads, strict=True))
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


@_loop_grad_op.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


_loop_op.register_autograd(_loop_backward, setup_context=_loop_setup)


def _varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """PyTorch's own variable-length flash attention (CUDA, 16 bit)."""
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(q.to(v.dtype), k.to(v.dtype), v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    assert isinstance(out, Tensor)
    return out


def _flash(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """The flash-attn package (CUDA, 16 bit)."""
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        q.to(v.dtype), k.to(v.dtype), v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip


def _flex(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, block_mask: BlockMask | None = None
) -> Tensor:
    """FlexAttention (CUDA)."""
    if block_mask is None:
        positions = torch.arange(len(q), device=q.device)
        block_mask = document_mask(torch.searchsorted(cu_seqlens, positions, right=True))
    q, k, v = (a.to(v.dtype).transpose(0, 1)[None] for a in (q, k, v))  # (1, H, T, d)
    kernel: Any = flex_attention if torch.compiler.is_compiling() else _compiled_flex()
    return kernel(q, k, v, block_mask=block_mask)[0].transpose(0, 1)


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(flex_attention)


def document_mask(row: Tensor) -> BlockMask:
    """The mask of a pack from the row of each token (T,), which never falls; without waiting for the device.

    A block of queries meets those blocks of keys whose rows overlap its own; where all are of one row, no token
    is looked at.
    """
    tokens = len(row)
    begins = torch.arange(0, tokens, FLEX_BLOCK, device=row.device)
    ends = begins + FLEX_BLOCK
    first, last = row[begins], row[(ends - 1).clamp(max=tokens - 1)]  # (blocks,)
    meet = (first[:, None] <= last) & (first <= last[:, None])  # (blocks, blocks)
    uniform = (first == last) & (ends <= tokens)
    full = meet & uniform[:, None] & uniform

    def same_row(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return row[i] == row[j]

    return BlockMask.from_kv_blocks(
        *_listed(meet & ~full), *_listed(full), FLEX_BLOCK, same_row, seq_lengths=(tokens, tokens)
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks (n, n) -> how many are set in each line (1, 1, n), and the numbers of these first (1, 1, n, n)."""
    numbers = blocks.int().argsort(dim=1, descending=True, stable=True)
    return blocks.sum(dim=1, dtype=torch.int32)[None, None], numbers.int()[None, None]


BACKENDS: dict[str, Backend] = {"loop": _loop, "varlen": _varlen, "flash": _flash, "flex": _flex}
