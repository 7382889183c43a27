"""Calls of a sharded network (FSDP2) of which each process makes its own number, as samplers do."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

NONE, PLAIN, CAST = range(3)
"""Calls of a process: none, in float32, in bfloat16."""


@contextmanager
def uneven_calls(net: nn.Module) -> Iterator[None]:
    """Within this context each process calls a network as often as it likes, without gradients.

    All processes enter; each leaves when all have made their calls. Until then it takes part in gathering the weights
    for the calls of the others, a block at a time as they do, and computes what its experts are sent. A network that is
    not sharded needs nothing of this.
    """
    divided = (part for part in net.modules() if hasattr(part, "unshard") or getattr(part, "exchange", None))
    parts = list(divided)  # the network itself, then its blocks
    if not parts:
        yield
        return

    def announce(*_: object) -> None:
        _calls(net, CAST if torch.is_autocast_enabled(_device(net).type) else PLAIN)

    hook = net.register_forward_pre_hook(announce, prepend=True)
    try:
        yield
    except FloatingPointError:  # of this process's images; the others go on
        _accompany(net, parts)
        raise
    finally:
        hook.remove()
    _accompany(net, parts)


def _calls(net: nn.Module, own: int) -> int:
    """Whether any process is about to call the network, and how; said by all of them together."""
    number = torch.tensor(float(own), device=_device(net))
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return int(number)


def _device(net: nn.Module) -> torch.device:
    return next(net.parameters()).device


@torch.no_grad()
def _accompany(net: nn.Module, parts: list[nn.Module]) -> None:
    while calls := _calls(net, NONE):
        with torch.autocast(_device(net).type, torch.bfloat16, enabled=calls == CAST):
            for part in parts:
                _take_part(part)


def _take_part(part: Any) -> None:
    gathers = hasattr(part, "unshard")
    if gathers:
        part.unshard()
    if getattr(part, "exchange", None):
        part.accompany()
    if gathers:
        part.reshard()
