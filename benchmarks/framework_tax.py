"""What genfound.train adds to a training step: processor time beside a bare loop over the same networks and batches.

python -m benchmarks.framework_tax [--models nit_tiny,nit_s] [--precision fp32,bf16] [--blocks 20] [--steps 20]

Blocks of few steps make both loops slower, and a run more than the bare loop: each begins with cold caches.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

import lightning
import torch
from torch import nn

from benchmarks.report import facts, write
from benchmarks.timing import cpu_precisions
from genfound import build
from genfound.batch import Batch
from genfound.config import compose
from genfound.modules.base import module_of
from genfound.objectives.weighting import image_weight
from genfound.rng import Rng
from genfound.runtime import run_directory
from genfound.training import fit

NEVER = 10**9
ON_SHAPES = (
    "data=shapes",
    "alignment=none",
    "tokenizer=pixel",
    "optimizer=adamw",
    "model.patch_size=2",
    "model.channels=3",
)


class BesideBareLoop(lightning.Callback):
    """Stops the run before every block of steps for as many of a bare loop; keeps the processor time of both.

    Args:
        steps: of a block.
    """

    rounds: ClassVar[list[tuple[float, float]]] = []

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._bare = 0.0
        self._began: float | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Begin the bare loop, with a network of its own."""
        parts: build.RunComponents = trainer.datamodule.parts
        self.loop = bare_loop(build.build_run(parts.config, 1), trainer.precision_plugin.forward_context)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """At the beginning of a block."""
        if batch_idx % self.steps:
            return
        begin = time.process_time()
        if self._began is not None:
            self.rounds.append((begin - self._began, self._bare))
        for _ in range(self.steps):
            next(self.loop)
        self._began = time.process_time()
        self._bare = self._began - begin


def bare_loop(parts: build.RunComponents, autocast: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Dropped labels, loss, backward, clip, fused AdamW, average: what is left of a step without any framework."""
    settings, net, objective, module = parts.config["optimizer"], parts.net.train(), parts.objective, module_of(parts)
    optimizer = torch.optim.AdamW(net.parameters(), lr=settings["lr"], betas=settings["betas"], fused=True)
    average = [p.detach().clone() for p in net.parameters()]
    for batch, micro in parts.loader(0):
        assert isinstance(batch, Batch)
        with autocast():
            losses = module.evaluate(batch, Rng(0, "train", micro.number))
        weights = image_weight(batch.tokens, objective.weight) * batch.real
        ((weights * losses.total).sum() / micro.weight_sum).backward()
        nn.utils.clip_grad_norm_(net.parameters(), settings["clip"])
        optimizer.step()
        optimizer.zero_grad()
        torch._foreach_lerp_(average, [p.detach() for p in net.parameters()], 1 - settings["ema_decay"])
        yield


def rounds(model: str, precision: str, blocks: int, steps: int) -> list[tuple[float, float]]:
    """Seconds of each block of a run and of the bare loop beside it, without the first, which warms up."""
    overrides = [
        f"model={model}", *ON_SHAPES, f"trainer.precision={precision}", "logger=jsonl", "batch.packs=1",
        f"trainer.max_steps={(blocks + 1) * steps + 1}",
        *(f"callbacks.{name}.every={NEVER}" for name in ("validation", "preview", "checkpointing")),
        f"+callbacks.beside={{_target_: {__name__}.BesideBareLoop, steps: {steps}}}",
    ]  # fmt: skip
    BesideBareLoop.rounds.clear()
    with tempfile.TemporaryDirectory() as scratch:
        run_directory.write_config(Path(scratch), compose.compose("train", overrides), allow_changes=False)
        fit(Path(scratch))
    return BesideBareLoop.rounds[1:]


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="nit_tiny,nit_s")
    parser.add_argument("--precision", default=",".join(cpu_precisions()))
    parser.add_argument("--blocks", type=int, default=20)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        "## Processor time of a step, one pack of drawings, one thread", "",
        "| model | precision | genfound.train, s | bare loop, s | tax, median of blocks | quartiles |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for model, precision in itertools.product(arguments.models.split(","), arguments.precision.split(",")):
        measured = rounds(model, precision, arguments.blocks, arguments.steps)
        ours, bare = (statistics.median(column) / arguments.steps for column in zip(*measured, strict=True))
        low, middle, high = statistics.quantiles([a / b - 1 for a, b in measured], n=4)
        lines.append(f"| {model} | {precision} | {ours:.3f} | {bare:.3f} | {middle:+.1%} | {low:+.1%} to {high:+.1%} |")
        print(lines[-1], flush=True)
    print(write("framework_tax", [facts(), "\n".join(lines)]))


if __name__ == "__main__":
    main()
