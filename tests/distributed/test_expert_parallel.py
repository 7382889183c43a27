"""Four processes that share the experts of a DiT-MoE train, sample and save what one process does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from genfound import build, training
from genfound.config import compose
from genfound.evaluation.provenance import network_hash
from genfound.layers.initial import local
from genfound.layers.moe import Experts
from genfound.modules.base import GenerativeModule
from genfound.runtime import checkpoint_io, receipts
from genfound.runtime import fsdp as sharding
from genfound.runtime.uneven_calls import uneven_calls
from genfound.sampling.pipeline import Pipeline
from genfound.sampling.requests import SampleRequest
from genfound.tokenizers import PixelTokenizer
from tests.cli.commands import genfound as command
from tests.distributed.test_devices import curve, free_port
from tests.distributed.test_fsdp import (
    CURVES,
    DENSE,
    EVALUATED,
    FEW,
    figures_of,
    of_one,
    pictures_of,
    prepared,
    spawn,
    train_on_two,
    with_a_gradient_that_is_not_finite,
)
from tests.distributed.test_sharded_sampling import network
from tests.helpers import composed, state_differences

pytestmark = pytest.mark.slow

MOE = ["model=dit_moe_tiny", "model.experts=4", *DENSE, "batch.images=32"]
"""Two micro-batches of each of four processes in a step."""

TINY_NET = ["model.width=32", "model.depth=2", "model.heads=2"]
SHARES = (1, 2, 4)
KINDS = {
    "plain": [],
    "recomputed": ["model.activation_checkpointing=true", "optimizer.clip=0.01"],
    "evaluated": EVALUATED,
    "upcycled": [],
}
FOLDER = "strategy.save_distributed_checkpoint=true"
SAVING = ["callbacks.checkpointing.every=48"]


def fsdp(share: int, *options: str) -> list[str]:
    return ["strategy=fsdp", f"strategy.expert_parallel={share}", *options]


def on_four(*runs: Path) -> None:
    spawn(of_one, 4, free_port(), runs, processes=4)


def observed(rank: int, port: int, runs: Sequence[Path]) -> None:
    """One of four processes, which notes how much of the experts it keeps, and how much a layer has to compute with."""
    step, forward = GenerativeModule.configure_gradient_clipping, Experts.forward
    found: dict[str, list[float]] = {}
    shares: set[float] = set()

    def computed(layer: Experts, *inputs: Any) -> Tensor:
        shares.update(local(p).numel() / p.numel() for p in layer.parameters())
        return forward(layer, *inputs)

    def measured(module: GenerativeModule, optimizer: Any, *arguments: Any, **named: Any) -> None:
        step(module, optimizer, *arguments, **named)
        stacks = [p for layer in module.net.modules() if isinstance(layer, Experts) for p in layer.parameters()]
        kept = [*stacks, *(p.grad for p in stacks), *(m for p in stacks for m in optimizer.state[p].values() if m.ndim)]
        found[str(module.trainer.default_root_dir)] = [*{local(t).numel() / t.numel() for t in kept}, *shares]
        shares.clear()

    GenerativeModule.configure_gradient_clipping = measured  # type: ignore[method-assign]
    Experts.forward = computed  # type: ignore[method-assign]
    of_one(rank, 4, port, runs)
    Path(f"{runs[0]}/../kept-{rank}.json").write_text(json.dumps(found))


def test_four_processes_train_and_evaluate_what_one_does_with_their_share_of_the_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    composed = compose.compose
    monkeypatch.setattr(compose, "compose", lambda *of: composed(*of) | (FEW if of[0] == "evaluate" else {}))
    dense = prepared(tmp_path / "dense", 1, *MOE, "model.experts=1", "model.top_k=1", "trainer.max_steps=1")
    training.fit(dense)
    kinds = {**KINDS, "upcycled": [f"init_from={dense}"]}
    runs = {
        (kind, share): prepared(tmp_path / f"{kind}_{share}", 4, *MOE, *options, *fsdp(share))
        for kind, options in kinds.items()
        for share in SHARES
    }
    spawn(observed, free_port(), list(runs.values()), processes=4)
    ones = {kind: prepared(tmp_path / kind, 1, *MOE, *options) for kind, options in kinds.items()}
    for one in ones.values():
        training.fit(one)
    for (kind, _), run in runs.items():
        for key in CURVES:
            assert curve(run, key) == pytest.approx(curve(ones[kind], key), rel=1e-5), f"{run.name} {key}"
        assert len(curve(run)) == 6
    for share in SHARES:
        run, one = runs["evaluated", share], ones["evaluated"]
        assert pictures_of(run) == pictures_of(one) and len(pictures_of(one)) >= 2
        assert figures_of(run) == pytest.approx(figures_of(one), rel=1e-3) and len(figures_of(one)) >= 2
    for rank in range(4):
        kept = json.loads((tmp_path / f"kept-{rank}.json").read_text())
        for (_, share), run in runs.items():
            assert kept[str(run)] == [1 / 4, 1 / share], run.name  # more of them is never gathered


def going_on(run: Path, devices: int, *options: str) -> Path:
    """A copy of a run, which is to reach its sixth step."""
    copy = run.with_name("_".join([run.name, "on", str(devices), *options]).replace("strategy", "").replace("=", "_"))
    shutil.copytree(run, copy)
    return prepared(copy, devices, *MOE, *SAVING, *options)


def test_a_run_moves_between_topologies(tmp_path: Path) -> None:
    def cut(name: str, devices: int, *options: str, steps: int = 3) -> Path:
        return prepared(tmp_path / name, devices, *MOE, *SAVING, *options, f"trainer.max_steps={steps}")

    folder, file = cut("folder", 4, *fsdp(2, FOLDER)), cut("file", 4, *fsdp(4))
    straight = [cut("a", 4, *fsdp(2, FOLDER), steps=6), cut("b", 4, *fsdp(2), steps=6)]
    on_four(folder, file, *straight)
    training.fit(one := cut("one", 1))
    training.fit(expected := cut("expected", 1, steps=6))
    back = going_on(folder, 4, *fsdp(2))
    fours = [
        back, going_on(folder, 4, *fsdp(4, FOLDER)), going_on(file, 4, *fsdp(2, FOLDER)),
        going_on(one, 4, *fsdp(4, FOLDER)), going_on(one, 4, *fsdp(2)), going_on(folder, 4, *fsdp(1)),
    ]  # fmt: skip
    on_four(*fours)
    twos = [going_on(run, 2, *options) for run in (folder, file) for options in (fsdp(1), fsdp(2), ["strategy=ddp"])]
    train_on_two(*twos)
    for run in (singles := [going_on(folder, 1), going_on(file, 1)]):
        training.fit(run)
    for run in (*fours, *twos, *singles, *straight):
        assert len(curve(run)) == 6
        for key in ("train/loss", "train/grad_norm"):
            assert curve(run, key) == pytest.approx(curve(expected, key), rel=1e-5), f"{run.name} {key}"
    assert not state_differences(straight[0], straight[1]) and not state_differences(back, straight[1])
    noted = [[line for line in receipts.read(run / receipts.FILE) if "checkpoint" in line] for run in straight]
    assert noted[0] == noted[1] and len(noted[0]) >= 2
    newest = [checkpoint_io.newest(run / "checkpoints") for run in straight]
    assert [path is not None and path.is_dir() for path in newest] == [True, False]


def test_a_compiled_block_breaks_around_experts_that_are_shared(tmp_path: Path) -> None:
    on_four(run := prepared(tmp_path / "compiled_shared", 4, *MOE, *fsdp(2), "compile=true", "trainer.max_steps=3"))
    training.fit(one := prepared(tmp_path / "one", 1, *MOE, "trainer.max_steps=3"))
    for key in CURVES:
        assert curve(run, key) == pytest.approx(curve(one, key), rel=1e-5)


def sampling(rank: int, port: int, folder: Path) -> None:
    """One of four processes that share experts, and sample each as much as it likes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=4)
    requests = [SampleRequest(label, (8, 8), label) for label in range((4, 1, 0, 2)[rank])]
    for precision, sampler, tolerance in (("fp32", "heun", 1e-5), ("bf16", "euler", 0.05)):
        options = [f"trainer.precision={precision}", f"sampler={sampler}", "guidance=cfg", "sample.batch=2"]
        config = composed(*MOE, *TINY_NET, *options)
        pipeline = Pipeline.from_config(config, build.objective(config), PixelTokenizer(), torch.device("cpu"), 2)
        single, shared = network(config), network(config)
        names = ("replicas", "experts")
        sharding.shard(
            shared, init_device_mesh("cpu", (4,)), None, init_device_mesh("cpu", (2, 2), mesh_dim_names=names)
        )
        assert network_hash(shared, config) == network_hash(single, config)
        with uneven_calls(shared):
            pictures = pipeline.latents(shared, requests, seed=3) if requests else []
        for picture, other in zip(
            pictures, pipeline.latents(single, requests, seed=3) if requests else [], strict=True
        ):
            assert (picture - other).norm() < tolerance * other.norm()
    (folder / str(rank)).touch()


def test_each_process_samples_as_much_as_it_likes(tmp_path: Path) -> None:
    spawn(sampling, free_port(), tmp_path, processes=4)
    assert len(list(tmp_path.iterdir())) == 4


def test_a_step_that_is_not_finite_in_one_process_is_skipped_by_all(tmp_path: Path) -> None:
    run = prepared(tmp_path / "run", 2, *MOE, *fsdp(2), "trainer.precision=bf16")
    spawn(with_a_gradient_that_is_not_finite, free_port(), [run])
    assert curve(run, "train/skipped") == [0, 0, 1, 0, 0, 0]
    state = checkpoint_io.read(checkpoint_io.newest(run / "checkpoints") or run)
    assert all(values.isfinite().all() for values in state["state_dict"].values())


def test_the_command_says_nothing_else_and_its_asynchronous_folders_are_those_of_one_that_waits(tmp_path: Path) -> None:
    small = [*TINY_NET, "trainer.devices=2", "data.batch_size=4", "batch.images=8", "callbacks.preview=null"]
    steps = ["trainer.max_steps=4", "trainer.log_every_n_steps=1", "callbacks.checkpointing.every=8"]
    given = ["model=dit_moe_tiny", *small, *steps, *fsdp(2, FOLDER)]
    for name, saving in (("waits", "false"), ("asynchronous", "true")):
        result = command(
            "train", *given, f"callbacks.checkpointing.asynchronous={saving}", f"name={name}", cwd=tmp_path
        )
        assert result.returncode == 0, result.stderr
        assert "Warning" not in result.stdout + result.stderr
    waits, asynchronous = (tmp_path / "runs/default" / name for name in ("waits", "asynchronous"))
    assert len(curve(waits)) == 4 and curve(waits) == curve(asynchronous)
    assert not state_differences(waits, asynchronous)
