"""The plan: which images make up each global optimizer step, on which rank.

The plan is a pure function of (seed, data, budget), made on every rank from image sizes alone, before any
image is read. Ranks only choose which micro-batches they read, so their number changes nothing. A run that
continues with another budget or global step reads what it had not read before.
Micro-batches are planned in windows; within one they are sorted by attention cost, so that the ranks of a
step have equal work, and the steps of a window are then shuffled, so that cost does not drift over a window.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from genfound.data.packing.order import Order
from genfound.data.packing.packer import Batcher
from genfound.objectives.weighting import image_weight
from genfound.rng import Rng
from genfound.runtime.files import digest


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch of one rank."""

    number: int  # of the micro-batch in the run; the key of its random draws
    positions: tuple[int, ...]  # of its images in the run
    indices: tuple[int, ...]  # of its images in the data set
    tokens: int  # of its images together
    step: int  # number of its global step
    weight_sum: float  # sum of the loss weights of all images of that step
    images_seen: int  # images of the run up to the end of that step


class Plan:
    """All global steps of a run, from any recorded step on."""

    def __init__(
        self, order: Order, tokens: np.ndarray, grouper: Batcher, per_step: int, weight: str, seed: int
    ) -> None:
        self.order = order
        self.tokens = tokens  # (n,) of each image of the data set
        self.grouper = grouper
        self.per_step = per_step  # micro-batches of a global step, over all ranks
        self.weight = weight
        self._rng = Rng(seed, "plan")
        # changes with whatever decides which positions make a micro-batch
        self._grouping = digest(tokens.astype(np.int64).tobytes(), repr((seed, grouper.kind)))
        self._start: dict[str, Any] = {"step": 0, "images_seen": 0, "micro": 0, "left": [], "grouper": grouper.state()}
        self._windows: list[dict[str, Any]] = []

    def steps(self) -> Iterator[list[MicroBatch]]:
        """Global steps, each as its micro-batches in the order of ranks, without end."""
        start = self._start
        self.grouper.restore(start["grouper"])
        step, seen, micro, left = start["step"], start["images_seen"], start["micro"], start["left"]
        same = start.get("per_step") == self.per_step
        steps = self._split(left) if same else self._window(step, left)
        while True:
            window = {"step": step, "images_seen": seen, "micro": micro, "steps": steps}
            self._windows.append({**window, "grouper": self.grouper.state()})
            for groups in steps:
                seen += sum(map(len, groups))
                yield self._micros(step, micro, seen, groups)
                step, micro = step + 1, micro + self.per_step
            steps = self._window(step, [])

    def _window(self, step: int, left: list[list[int]]) -> list[list[list[int]]]:
        """The groups of the next steps: what is left of a window, or a new one.

        Those of a step are matched by the pairs of tokens that attend to each other; other costs are constant.
        """
        steps = -(-(len(left) or self.grouper.window) // self.per_step)
        groups = [*left, *(self.grouper.take() for _ in range(steps * self.per_step - len(left)))]
        if steps == 1:
            return [groups]
        groups.sort(key=lambda group: int((self.tokens[[self.order[k] for k in group]] ** 2).sum()))
        matched = self._split(groups)
        return [matched[i] for i in self._rng.at(step).permutation("window", steps).tolist()]

    def _split(self, groups: list[list[int]]) -> list[list[list[int]]]:
        return [groups[i : i + self.per_step] for i in range(0, len(groups), self.per_step)]

    def _micros(self, step: int, first: int, seen: int, groups: list[list[int]]) -> list[MicroBatch]:
        indices = [tuple(self.order[k] for k in group) for group in groups]
        weight = sum(float(image_weight(self.tokens[list(i)], self.weight).sum()) for i in indices)
        return [
            MicroBatch(first + j, tuple(group), own, int(self.tokens[list(own)].sum()), step, weight, seen)
            for j, (group, own) in enumerate(zip(groups, indices, strict=True))
        ]

    def state(self, step: int) -> dict[str, Any]:
        """What `restore` needs to continue with this step; older records are dropped."""
        older = [w for w in self._windows if w["step"] <= step]
        if not older:
            return {"per_step": self.per_step, **self._start, "grouping": self._grouping}
        window = older[-1]
        self._windows = [w for w in self._windows if w["step"] >= window["step"]]
        read = window["steps"][: step - window["step"]]
        return {
            "step": step,
            "images_seen": window["images_seen"] + sum(len(group) for groups in read for group in groups),
            "micro": window["micro"] + len(read) * self.per_step,
            "left": [group for groups in window["steps"][len(read) :] for group in groups],
            "grouper": window["grouper"],
            "per_step": self.per_step,
            "grouping": self._grouping,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Let `steps` begin with the recorded step, after exactly the positions that were read until then.

        Another number of micro-batches a step regroups those that are left of the window. Where micro-batches are
        made otherwise (another budget of tokens, other images), their positions wait to be grouped anew.
        """
        if "left" not in state:
            raise ValueError(
                "the checkpoint records its place in the data as earlier versions of genfound did, which this one "
                "cannot continue; start a new run with init_from=..."
            )
        self._start, self._windows = dict(state), []
        if state["grouping"] != self._grouping:
            waiting = sorted([*state["grouper"]["waiting"], *(k for group in state["left"] for k in group)])
            self._start |= {"left": [], "grouper": {**state["grouper"], "waiting": waiting}}
