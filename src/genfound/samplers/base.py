"""What a sampler is: a function that moves noise to data, and what it needs of a field.

    @sampler(needs="velocity")
    def mine(field, batch, times, rng, progress=None, *, strength=1.0) -> Batch: ...

Its options are the arguments after the star. conf/sampler/mine.yaml names it by `_target_`, with `_partial_: true`,
`name`, `steps` and values of the options. `batch` is noise, and what is returned is at the last of `times` (float64
on the host); `progress` is called with the state after each step.
"""

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from genfound.batch import Batch
from genfound.objectives.base import Objective

Progress = Callable[[int, Batch], None]
"""Called after each step with its number and the state."""

Where = TypeVar("Where")


class StepRng(Protocol):
    """The noise of stochastic samplers; every image has its own."""

    def normal(self, step: int) -> Tensor:
        """Standard normal numbers of a step, shaped like `batch.x`."""


class Sampler:
    """A function, what it needs, and its options; no dataclass, which Hydra would take for a configuration.

    Args:
        function: (field, batch, times, rng, progress, **options) -> Batch.
        needs: of a field: `velocity`, `flow` (all of its `Predictions`), `gaussian` (the steps of DDPM) or `levels`
            (`NoiseLevels`).
        check: takes the options and raises a ValueError for a value that is not legal.
        coupling: takes the options; what the length of a step depends on: `batch`, all images of a network call,
            `image`, each its own, or nothing.
    """

    name = ""
    steps: Any = None  # see `Objective.times`
    options: Mapping[str, Any] = MappingProxyType({})

    def __init__(
        self,
        function: Callable[..., Batch],
        needs: str,
        check: Callable[..., object] = lambda **options: None,
        coupling: Callable[..., str] = lambda **options: "",
    ) -> None:
        self.function = torch.no_grad()(function)
        self.__module__, self.__qualname__ = function.__module__, function.__qualname__  # early Hydra 1.3 looks it up
        self.needs, self._check, self._coupling = needs, check, coupling

    def __call__(self, *arguments: Any, **options: Any) -> Batch:
        """Walk."""
        return self.function(*arguments, **{**self.options, **options})

    def configured(self, name: str, steps: Any, options: Mapping[str, Any]) -> "Sampler":
        """With these options, and its own values of the others."""
        parameters = inspect.signature(self.function).parameters.values()
        usual = {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
        if foreign := sorted(options.keys() - usual.keys()):
            known = ", ".join(["steps", *usual])
            raise ValueError(f"sampler.{foreign[0]} is not an option of sampler={name}; its options: {known}")
        found = copy.copy(self)
        found.name, found.steps, found.options = name, steps, {**usual, **options}
        self._check(**found.options)
        return found

    @property
    def coupling(self) -> str:
        """What the length of a step depends on, with these options."""
        return self._coupling(**self.options)

    def times(self, objective: Objective) -> Tensor:
        """The times to walk, from noise to data."""
        spacing = {key: self.options[key] for key in ("spacing",) if key in self.options}
        return objective.times(self.steps, self.needs, **spacing)


def sampler(needs: str, **declared: Any) -> Callable[[Callable[..., Batch]], Sampler]:
    """Declare a function to be a sampler; see `Sampler`."""
    return lambda function: Sampler(function, needs, **declared)


def walk(
    batch: Batch,
    steps: Iterable[Where],
    move: Callable[[int, Batch, Where], Tensor],
    progress: Progress | None,
    dtype: torch.dtype = torch.float64,
) -> Batch:
    """Move a state (number of the step, state, step) -> next one; kept in `dtype`, shown and returned in float32."""
    state = replace(batch, x=batch.x.to(dtype))
    for number, step in enumerate(steps):
        state = replace(state, x=move(number, state, step))
        if progress is not None:
            progress(number, replace(state, x=state.x.float()))
    return replace(state, x=state.x.float())
