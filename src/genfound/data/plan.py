"""The plan: which images make up each global optimizer step, on which rank.

The plan is a pure function of (seed, data, budget), made on every rank from image sizes alone, before any
image is read. Ranks only choose which micro-batches they read, so their number changes nothing.
Micro-batches are planned in windows; within one they are sorted by attention cost, so that the ranks of a
step have equal work, and the steps of a window are then shuffled, so that cost does not drift over a window.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from genfound.data.order import Order
from genfound.data.packing import Grouper, in_order
from genfound.objectives.weighting import image_weight
from genfound.rng import Rng


@dataclass(frozen=True)
class Micro:
    """One micro-batch of one rank.

    Attributes:
        number: of the micro-batch in the run; the key of its random draws.
        positions: of its images in the run.
        indices: of its images in the data set.
        tokens: of its images together.
        step: number of its global step.
        step_weight: sum of the loss weights of all images of that step.
        images_seen: images of the run up to the end of that step.
    """

    number: int
    positions: tuple[int, ...]
    indices: tuple[int, ...]
    tokens: int
    step: int
    step_weight: float
    images_seen: int


def each_once(
    order: Order, tokens: np.ndarray, images: int, max_tokens: float, max_images: int, weight: str
) -> list[Micro]:
    """One step that holds the first images of an order, at most all of them, each once and in order.

    Args:
        order: position -> image.
        tokens: (n,) tokens of each image of the data set.
        images: how many are wanted.
        max_tokens, max_images: of a micro-batch.
        weight: rule of the loss weights.
    """
    indices = [order[k] for k in range(min(images, len(tokens)))]
    counts = [int(tokens[i]) for i in indices]
    total = float(image_weight(np.array(counts, dtype=float), weight).sum())
    return [
        Micro(j, tuple(ks), tuple(indices[k] for k in ks), sum(counts[k] for k in ks), 0, total, len(indices))
        for j, ks in enumerate(in_order(counts, max_tokens, max_images))
    ]


class Plan:
    """All global steps of a run, from any recorded step on.

    Args:
        order: position -> image.
        tokens: (n,) tokens of each image of the data set.
        grouper: makes micro-batches of positions.
        per_step: micro-batches of a global step, over all ranks.
        weight: rule of the loss weights.
        seed: seed of the run.
    """

    def __init__(
        self, order: Order, tokens: np.ndarray, grouper: Grouper, per_step: int, weight: str, seed: int
    ) -> None:
        self.order = order
        self.tokens = tokens
        self.grouper = grouper
        self.per_step = per_step
        self.weight = weight
        self._rng = Rng(seed, "plan")
        self._start: dict[str, Any] = {"step": 0, "images_seen": 0, "grouper": grouper.state()}
        self._skip = 0
        self._windows: list[dict[str, Any]] = []

    def steps(self) -> Iterator[list[Micro]]:
        """Global steps, each as its micro-batches in the order of ranks, without end."""
        self.grouper.restore(self._start["grouper"])
        step, seen, skip = self._start["step"], self._start["images_seen"], self._skip
        while True:
            self._windows.append({"step": step, "images_seen": seen, "grouper": self.grouper.state()})
            for groups in self._window(step):
                seen += sum(map(len, groups))
                if skip:
                    skip -= 1
                else:
                    yield self._micros(step, seen, groups)
                step += 1

    def _window(self, step: int) -> list[list[list[int]]]:
        """The groups of the next steps, matched by cost within a step."""
        steps = -(-self.grouper.window // self.per_step)
        groups = [self.grouper.take() for _ in range(steps * self.per_step)]
        if steps == 1:
            return [groups]
        groups.sort(key=self._cost)
        matched = [groups[i : i + self.per_step] for i in range(0, len(groups), self.per_step)]
        return [matched[i] for i in self._rng.at(step).permutation("window", steps).tolist()]

    def _cost(self, group: list[int]) -> int:
        """Pairs of tokens that attend to each other; the rest of a pack's cost is constant."""
        return int((self.tokens[[self.order[k] for k in group]] ** 2).sum())

    def _micros(self, step: int, seen: int, groups: list[list[int]]) -> list[Micro]:
        indices = [tuple(self.order[k] for k in group) for group in groups]
        weight = sum(float(image_weight(self.tokens[list(i)], self.weight).sum()) for i in indices)
        first = step * self.per_step
        return [
            Micro(first + j, tuple(group), own, int(self.tokens[list(own)].sum()), step, weight, seen)
            for j, (group, own) in enumerate(zip(groups, indices, strict=True))
        ]

    def state(self, step: int) -> dict[str, Any]:
        """What `restore` needs to continue with this step; older records are dropped."""
        older = [w for w in self._windows if w["step"] <= step] or [self._start]
        self._windows = [w for w in self._windows if w["step"] >= older[-1]["step"]]
        return {"window": older[-1], "step": step}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Let `steps` begin with the recorded step."""
        self._start = dict(state["window"])
        self._skip = state["step"] - self._start["step"]
        self._windows = []
