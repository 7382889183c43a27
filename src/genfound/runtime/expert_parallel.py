"""Expert parallelism: processes that share a copy of the experts send each other the rows of their tokens.

Of k processes each has E / k consecutive experts. Rows, sorted by expert, go to the processes of their experts, are
computed there beside those of the others, and come back: outputs and gradients are those of the whole stacks, to the
rounding of sums.

Legend: E experts, k processes, S rows of this process, R rows that its experts get, D width.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from genfound.layers.expert_kernels import Kernel
from genfound.layers.moe import Experts


class Route(NamedTuple):
    """The ways of the rows of one layer."""

    group: dist.ProcessGroup
    sent: list[int]  # rows to each process, S in all
    received: list[int]  # rows from each process, R in all
    order: Tensor  # (R,) which received row is the next one, by expert
    place: Tensor  # (R,) the inverse
    ends: Tensor  # (E / k,) int32, where each expert's rows end in that order


class Exchange:
    """Computes rows where their experts are, see `Experts.exchange`; the host must know how many rows come."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def __call__(self, kernel: Kernel, rows: Tensor, ends: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        """A kernel's output (S, D) for rows of all E experts, of which the weights are those of E / k.

        Gradients of weights are means over the processes, as those of all others are.
        """
        for stack in (gate_up, down):
            if stack.requires_grad:
                stack.register_hook(self._mean)
        route = self._route(ends)
        out = kernel(_Moved.apply(rows, route, False), route.ends, gate_up, down)  # type: ignore[no-untyped-call]
        return _Moved.apply(out, route, True)  # type: ignore[no-untyped-call,no-any-return]

    def _mean(self, grad: Tensor) -> Tensor:
        return grad / self.group.size()

    def _route(self, ends: Tensor) -> Route:
        mine = ends.diff(prepend=ends.new_zeros(1)).view(self.group.size(), -1)  # (k, E / k) rows for each expert
        theirs = torch.empty_like(mine)  # (k, E / k) rows that each process has for the experts here
        dist.all_to_all_single(theirs, mine, group=self.group)
        sent, received = torch.stack((mine.sum(dim=1), theirs.sum(dim=1))).tolist()
        numbers = torch.arange(theirs.shape[1], device=ends.device).expand_as(theirs).flatten()
        order = numbers.repeat_interleave(theirs.flatten(), output_size=sum(received)).argsort(stable=True)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        return Route(self.group, sent, received, order, place, theirs.sum(dim=0).cumsum(dim=0, dtype=torch.int32))


class _Moved(torch.autograd.Function):
    """(S, D) rows sorted by expert -> (R, D) those of the experts here, or back; the gradient goes the other way."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, route: Route, back: bool) -> Tensor:
        ctx.route, ctx.back = route, back
        return _back(rows, route) if back else _there(rows, route)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _there(grad, ctx.route) if ctx.back else _back(grad, ctx.route), None, None


def _there(rows: Tensor, route: Route) -> Tensor:
    """Each row to the process of its expert, sorted by expert there."""
    received = rows.new_empty(sum(route.received), rows.shape[1])
    dist.all_to_all_single(received, rows.contiguous(), route.received, route.sent, group=route.group)
    return received.index_select(0, route.order)


def _back(rows: Tensor, route: Route) -> Tensor:
    """Each row to where it came from."""
    returned = rows.new_empty(sum(route.sent), rows.shape[1])
    dist.all_to_all_single(returned, rows.index_select(0, route.place), route.sent, route.received, group=route.group)
    return returned


def divide(net: nn.Module, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> set[nn.Parameter]:
    """Leave each process its share of every stack of experts; the parameters that are divided so.

    Where blocks are compiled, these layers stay eager, between two graphs: how many rows come is not static.

    Args:
        net: with its experts whole.
        mesh: `replicas` copies of the experts, each of which `experts` processes share. Several copies divide the
            weights of an expert among them, and gather them when they are used, along a later dimension than the first.
        policy: of that.
    """
    exchange = Exchange(mesh.get_group("experts"))
    layers = [layer for layer in net.modules() if isinstance(layer, Experts)]
    for layer in layers:
        layer.exchange = exchange
        layer.forward = torch.compiler.disable(layer.forward)  # type: ignore[method-assign]
        for name, parameter in list(layer.named_parameters()):
            part = distribute_tensor(parameter.detach(), mesh["experts"], [Shard(0)], src_data_rank=None).clone()
            setattr(layer, name, nn.Parameter(part, requires_grad=parameter.requires_grad))
        if (copies := mesh["replicas"]).size() > 1:
            fully_shard(layer, mesh=copies, shard_placement_fn=lambda p: _later(p, copies), mp_policy=policy)
    return {parameter for layer in layers for parameter in layer.parameters()}


def _later(stack: Tensor, copies: DeviceMesh) -> Shard:
    return Shard(next(dim for dim in range(1, stack.ndim) if stack.shape[dim] % copies.size() == 0))
