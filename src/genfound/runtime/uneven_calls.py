"""Calls of a sharded network (FSDP2) of which each process makes its own number, as samplers do."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def uneven_calls(net: nn.Module) -> Iterator[None]:
    """Within this context each process calls a network as often as it likes, without gradients.

    All processes enter; each leaves when all have made their calls. Until then it takes part in gathering the weights
    for the calls of the others, a block at a time as they do. A network that is not sharded needs nothing of this.
    """
    parts = [part for part in net.modules() if hasattr(part, "unshard")]  # the network itself, then its blocks
    if not parts:
        yield
        return

    def announce(*_: object) -> None:
        _any_calls(net, True)

    hook = net.register_forward_pre_hook(announce, prepend=True)
    try:
        yield
    except FloatingPointError:  # of this process's images; the others go on
        _accompany(net, parts)
        raise
    finally:
        hook.remove()
    _accompany(net, parts)


def _any_calls(net: nn.Module, own: bool) -> bool:
    """Whether any process is about to call the network; said by all of them together."""
    number = torch.tensor(float(own), device=next(net.parameters()).device)
    torch.distributed.all_reduce(number)
    return bool(number)


def _accompany(net: nn.Module, parts: list[nn.Module]) -> None:
    while _any_calls(net, False):
        for part in parts:
            part.unshard()  # type: ignore[operator]
            part.reshard()  # type: ignore[operator]
