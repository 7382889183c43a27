"""Two processes evaluate during training; neither ends the other by waiting for it."""

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import distributed
from torch import multiprocessing as mp

from genfound import build
from genfound.callbacks import evaluation
from genfound.callbacks.ema import Ema
from genfound.config import compose
from genfound.evaluation import evaluator
from genfound.evaluation.protocol import read_results
from genfound.metrics import reference_stats
from genfound.modules.base import module_of
from genfound.runtime import run_directory
from genfound.sampling.pipeline import Pipeline
from tests.callbacks.test_evaluation import EVALUATED
from tests.evaluation.runs import TINY
from tests.helpers import run_dir

LIMIT, LONG = 3.0, 7.0
"""Seconds after which a collective gives up, and that the first process alone is busy."""


def slow(function: Callable[..., Any]) -> Callable[..., Any]:
    def slowed(*arguments: Any) -> Any:
        time.sleep(LONG)
        return function(*arguments)

    return slowed


def diverge(*_: Any) -> None:
    raise FloatingPointError("an image is not finite")


def evaluating(rank: int, folder: Path) -> None:
    """One of two processes: prepares an evaluation and does it, with the first one slow where it works alone."""
    torch.set_num_threads(1)
    composed = compose.compose
    compose.compose = lambda name, overrides: {**composed(name, overrides), "n": 130, "reference_images": 130}
    reference_stats.write_reference = slow(reference_stats.write_reference)
    evaluator.compute = slow(evaluator.compute)
    parts = build.build_run(run_directory.read_config(folder), 2)
    ema = Ema([0.9])
    acting = evaluation.Evaluation(**EVALUATED)
    module = module_of(parts).eval()
    distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    distributed.barrier()
    group = distributed.new_group(timeout=timedelta(seconds=LIMIT))

    strategy = SimpleNamespace(barrier=lambda: distributed.barrier(group))
    trainer: Any = SimpleNamespace(
        global_rank=rank,
        world_size=2,
        is_global_zero=rank == 0,
        global_step=0,
        strategy=strategy,
        callbacks=[ema],
        loggers=[],
        default_root_dir=folder,
        datamodule=SimpleNamespace(parts=parts),
    )
    acting.setup(trainer, module, "fit")
    ema.on_train_start(trainer, module)
    acting.on_train_start(trainer, module)
    parts_of_rank = sorted(file.name for file in folder.parent.rglob("*.parts/*.npz"))
    assert not parts_of_rank, "features of the reference are removed when its file is there"
    acting.on_interval(trainer, module)
    if rank == 1:
        Pipeline.__call__ = diverge  # type: ignore[method-assign, assignment]
    notes: list[str] = []
    evaluation.note = lambda _, text: notes.append(text)
    acting.on_interval(trainer, module)
    assert notes == ["no evaluation: an image is not finite"], "both processes hear of it and go on"
    distributed.destroy_process_group()


@pytest.mark.slow
def test_ranks_wait_as_long_as_the_first_one_works_alone_and_stop_together(tmp_path: Path) -> None:
    folder = run_dir(tmp_path / "run", *TINY, "batch.packs=2", f"runs={tmp_path}", "trainer.precision=fp32")
    mp.spawn(evaluating, (folder,), nprocs=2)
    assert [result.protocol.count for result in read_results(folder)] == [130]
    assert len(list((tmp_path / ".references").glob("*.npz"))) == 1
    assert not (folder / "evaluations/work").exists()
