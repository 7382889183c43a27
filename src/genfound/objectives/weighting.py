"""How much each image counts in the loss of a global step."""

from __future__ import annotations

from typing import Protocol, TypeVar


class _Number(Protocol):
    def __pow__(self, exponent: float, /) -> _Number: ...


N = TypeVar("N", bound=_Number)

EXPONENTS = {"image": 0.0, "sqrt": 0.5, "token": 1.0}


def image_weight(tokens: N, rule: str) -> N:
    """Weight of an image with this many tokens (number, array or tensor): 1, sqrt(tokens) or tokens.

    The loss is sum(weight * loss) / sum(weight) over all images of the global step.
    """
    return tokens ** EXPONENTS[rule]  # type: ignore[return-value]
