"""Initial values of parameters."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from genfound.rng import Rng


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
        values = parameter if parameter.device.type == "cpu" else torch.empty_like(parameter, device="cpu")
        law(values, **options, generator=generator)
        if values is not parameter:
            parameter.copy_(values)
