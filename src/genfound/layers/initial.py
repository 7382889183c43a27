"""Initial values of parameters."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from genfound.rng import Rng


def local(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor (`DTensor`) that this process keeps; all of another one."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor (`DTensor`), which all processes gather together; another one as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


class Draw:
    """Draws each parameter of a network from a stream of its own.

    Values depend on the seed, the number of the parameter in order of registration, its shape and its law alone: not
    on other parameters, and not on the device, since all are drawn on the CPU. On `meta` nothing is done. Without an
    rng all parameters are drawn from torch's global generator, one after the other.
    """

    def __init__(self, net: nn.Module, rng: Rng | None = None) -> None:
        numbered = enumerate(net.parameters())
        self.streams: dict[Tensor, Rng] = {} if rng is None else {p: rng.at(number) for number, p in numbered}

    @torch.no_grad()
    def __call__(self, law: Callable[..., Tensor], parameter: Tensor, **options: float) -> None:
        """Fill a parameter by one of `torch.nn.init`'s functions, with its options."""
        if parameter.is_meta:
            return
        generator = self.streams[parameter].generator("values") if self.streams else None
        placements = getattr(parameter, "placements", None)  # of a part of a sharded one, all of which is drawn
        in_place = parameter.device.type == "cpu" and placements is None
        values = parameter if in_place else torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
        law(values, **options, generator=generator)
        if placements is not None:
            from torch.distributed.tensor import distribute_tensor  # slow to import

            mesh = parameter.device_mesh  # type: ignore[attr-defined]
            parameter.copy_(distribute_tensor(values, mesh, placements, src_data_rank=None))
        elif not in_place:
            parameter.copy_(values)
