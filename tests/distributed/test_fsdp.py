"""Two processes that share out weights, gradients, moments and averages train the run of one."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing as mp
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from genfound import build, training
from genfound.backbones.base import Backbone
from genfound.callbacks.ema import the_ema
from genfound.config import compose
from genfound.evaluation.protocol import read_results
from genfound.layers.initial import local
from genfound.modules.base import GenerativeModule, TrainItem
from genfound.reporting import estimate
from genfound.rng import Rng
from genfound.runtime import checkpoint_io, fsdp, launch, run_directory
from genfound.runtime.processes import RankInfo
from tests.callbacks.test_evaluation import FEW
from tests.distributed.test_devices import curve, free_port
from tests.evaluation.runs import TINY
from tests.helpers import ALIGNED, composed, run_dir

SMALL = [
    *TINY, "model.depth=2", "model.heads=2", "batch.packs=4", "trainer.precision=fp32", "trainer.max_steps=6",
    "trainer.log_every_n_steps=1", "callbacks.validation.every=20", "callbacks.validation.images=17",
    "callbacks.preview.every=1000", "ema.decays=[0.9,0.99]",
]  # fmt: skip
"""Two micro-batches of each of two processes in a step, and three of validation, which two do not divide."""

DENSE = ["data.view=square", "data.size=8", "data.batch_size=4", "batch.packs=null", "batch.images=16"]
NETS = {
    "nit": ["model=nit_tiny"],
    "dit": ["model=dit_tiny", *DENSE],
    "dit_moe": ["model=dit_moe_tiny", "model.experts=3", *DENSE],  # which two do not divide
    "dig": ["model=dig_tiny"],
    "dim": ["model=dim_tiny", *DENSE],
    "frozen": ["model=nit_tiny", "optimizer.trainable=[blocks.1,final_layer]"],
    "muon": ["model=nit_tiny", "optimizer=muon"],
    "aligned": ["model=nit_tiny", *ALIGNED, "alignment.every=2"],
    "compiled": ["model=nit_tiny", "model.activation_checkpointing=2"],
}
CURVES = ("train/loss", "train/grad_norm", "val/loss", "val/velocity_mse_ema")


def of_one(rank: int, ranks: int, port: int, runs: Sequence[Path]) -> None:
    """One process of a group, which trains several runs."""
    place = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "MASTER_PORT": port, "GROUP_RANK": 0}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "1", **{k: str(v) for k, v in place.items()}}
    torch.set_num_threads(1)
    composed, step = compose.compose, GenerativeModule.configure_gradient_clipping
    compose.compose = lambda name, over: composed(name, over) | (FEW if name == "evaluate" else {})
    sizes: dict[str, int] = {}

    def measured(module: GenerativeModule, optimizer: Any, *arguments: Any, **named: Any) -> None:
        step(module, optimizer, *arguments, **named)
        if module.trainer.global_step == 1:  # moments are there
            sizes[str(module.trainer.default_root_dir)] = live_bytes(module)

    GenerativeModule.configure_gradient_clipping = measured  # type: ignore[method-assign]
    for run in runs:
        training.fit(run, RankInfo(rank, ranks, rank))
    compiled = {run.name for run in runs if run.name.startswith("compiled_")}
    assert bool(counters["stats"]) == bool(compiled) and bool(counters["graph_break"]) == (
        "compiled_shared" in compiled
    )
    Path(f"{runs[0]}/../bytes-{rank}.json").write_text(json.dumps(sizes))


def live_bytes(module: GenerativeModule) -> int:
    """Of what this process keeps of weights, gradients, moments and averages."""
    ema = the_ema(module.trainer)
    assert ema is not None
    optimizer = module.trainer.optimizers[0]
    weights = list(module.net.parameters())
    moments = [value for state in optimizer.state.values() for value in state.values()]
    averages = [value for average in ema.averages.values() for value in average.values()]
    kept = [local(t) for t in (*weights, *(p.grad for p in weights if p.grad is not None), *moments, *averages)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    return sum(storages.values())


def spawn(work: Callable[..., None], *arguments: Any, processes: int = 2) -> None:
    """Call a function with the ranks of a group and arguments, each in a process that ends as those of a command."""
    mp.spawn(_to_its_end, (work, arguments), nprocs=processes)


def _to_its_end(rank: int, work: Callable[..., None], arguments: Sequence[Any]) -> None:
    work(rank, *arguments)
    launch.end_process()


def train_on_two(*runs: Path) -> None:
    spawn(of_one, 2, free_port(), runs)


def prepared(folder: Path, devices: int, *overrides: str) -> Path:
    small = [option for option in SMALL if "heads" not in option or "model=dim_tiny" not in overrides]
    return run_dir(folder, *small, f"runs={folder.parent}", f"trainer.devices={devices}", *overrides)


@pytest.mark.slow
def test_ddp_and_fsdp_train_what_one_process_trains(tmp_path: Path) -> None:
    pairs = {f"{net}_{strategy}": [*options, f"strategy={strategy}"] for net, options in NETS.items()
             for strategy in ("ddp", "fsdp")}  # fmt: skip
    del pairs["compiled_ddp"], pairs["muon_ddp"]  # see test_devices
    pairs["compiled_fsdp"].append("compile=true")
    train_on_two(*(prepared(tmp_path / name, 2, *options) for name, options in pairs.items()))
    for net, options in NETS.items():
        one = prepared(tmp_path / net, 1, *options)
        training.fit(one)
        for two in (tmp_path / name for name in pairs if name.rpartition("_")[0] == net):
            for key in CURVES:
                assert curve(two, key) == pytest.approx(curve(one, key), rel=1e-5), f"{two.name} {key}"
            assert len(curve(two)) == 6 and len(curve(two, "val/loss")) >= 2
    for rank in (0, 1):
        sizes = json.loads((tmp_path / f"bytes-{rank}.json").read_text())
        for net in ("nit", "dit", "dit_moe"):
            ddp, fsdp = (sizes[str(tmp_path / f"{net}_{strategy}")] for strategy in ("ddp", "fsdp"))
            assert 0.45 * ddp < fsdp < 0.55 * ddp


@pytest.mark.slow
def test_gradients_are_summed_in_bf16_where_that_is_chosen(tmp_path: Path) -> None:
    runs = {}
    for name in ("default", "null", "bf16"):
        chosen = [] if name == "default" else [f"strategy.reduce_dtype={name}"]
        runs[name] = prepared(tmp_path / name, 2, "model=nit_tiny", "strategy=fsdp", *chosen)
    train_on_two(*runs.values())
    norms = {name: curve(run, "train/grad_norm") for name, run in runs.items()}
    assert norms["null"] == norms["default"] and len(norms["null"]) == 6
    assert norms["bf16"] != norms["null"] and norms["bf16"] == pytest.approx(norms["null"], rel=0.01)
    with pytest.raises(ValueError, match=r"strategy\.reduce_dtype: bf16 in the run, None now"):
        prepared(tmp_path / "bf16", 2, "model=nit_tiny", "strategy=fsdp")


EVALUATED = ["callbacks.evaluation.every=40", "callbacks.evaluation.protocol=quick", "callbacks.preview.every=40"]


@pytest.mark.slow
def test_a_run_moves_between_strategies_with_its_evaluations_and_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    composed = compose.compose
    monkeypatch.setattr(compose, "compose", lambda *of: composed(*of) | (FEW if of[0] == "evaluate" else {}))
    moved, stayed = tmp_path / "moved", tmp_path / "stayed"
    for steps, strategy in ((2, "ddp"), (5, "fsdp"), (6, "fsdp"), (8, None)):
        options = ["model=nit_tiny", f"strategy={strategy or 'auto'}", f"trainer.max_steps={steps}", *EVALUATED]
        prepared(moved, 2 if strategy else 1, *options)
        train_on_two(moved) if strategy else training.fit(moved)
    training.fit(prepared(stayed, 1, *options))
    for key in CURVES:
        assert curve(moved, key) == pytest.approx(curve(stayed, key), rel=1e-5)
    pictures, figures, kept = ([of(run) for run in (moved, stayed)] for of in (pictures_of, figures_of, weights_of))
    assert len(pictures[1]) >= 2 and pictures[0] == pictures[1]
    assert len(figures[1]) >= 2 and figures[0] == pytest.approx(figures[1], rel=1e-3)
    torch.testing.assert_close(*kept, rtol=0, atol=1e-6)


def pictures_of(run: Path) -> list[str]:
    return sorted(file.name for file in (run / "samples").iterdir())


def figures_of(run: Path) -> list[float]:
    return [result.figures["fd_probe"] for result in read_results(run)]


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    newest = checkpoint_io.newest(run / "checkpoints")
    assert newest is not None
    state = checkpoint_io.read(newest)
    return {**state["state_dict"], **state["ema"]["0.9"]}


def held_at_most(rank: int, port: int, run: Path) -> None:
    """One of two processes, which never has memory for the whole network."""
    materialise, parts = Backbone.materialise, []

    def measured(net: Backbone, rng: Rng) -> None:
        parts.append(sum(local(p).numel() for p in net.parameters()) / sum(p.numel() for p in net.parameters()))
        materialise(net, rng)

    Backbone.materialise = measured  # type: ignore[method-assign]
    of_one(rank, 2, port, [run])
    assert len(parts) == 1 and parts[0] < 0.55


@pytest.mark.slow
@pytest.mark.parametrize("model", ["nit", "dit_moe"])
def test_parts_are_drawn_where_they_lie_with_the_values_of_the_whole(model: str, tmp_path: Path) -> None:
    options = ["strategy=fsdp", "optimizer.lr=0", "trainer.max_steps=1"]
    run = prepared(tmp_path / "run", 2, *NETS[model], *options)
    spawn(held_at_most, free_port(), run)
    whole = build.build_run(run_directory.read_config(run), 2).net.state_dict()
    kept = weights_of(run)
    assert whole.keys() == {name.removeprefix("net.") for name in kept if name.startswith("net.")}
    for name, values in whole.items():
        assert torch.equal(kept[f"net.{name}"], values), name


@pytest.mark.parametrize("share", [1, 2, 8])
def test_the_largest_network_is_divided_among_eight_processes_as_planned(
    share: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "activations", lambda *_: (0, 0))
    options = ["strategy=fsdp", "trainer.devices=8", f"strategy.expert_parallel={share}"]
    config = composed("model=dit_moe_g_16e2a", "data=imagenet_256", *options)
    plan, parts = estimate.estimate(config), []
    for rank in range(8):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=8)
        try:
            with torch.device("meta"):
                net = build.net(config, build.published_spec(config), estimate.CLASSES)
            names = ("replicas", "experts")
            experts = init_device_mesh("cpu", (8 // share, share), mesh_dim_names=names) if share > 1 else None
            fsdp.shard(net, init_device_mesh("cpu", (8,)), None, experts)
            parts.append(sum(local(p).numel() for p in net.parameters()))
        finally:
            dist.destroy_process_group()
    assert sum(parts) == plan.parameters == 16_503_370_784 and max(parts) == plan.parameters / 8
    assert plan.memory.weights == 4 * max(parts)


def with_a_gradient_that_is_not_finite(rank: int, port: int, runs: Sequence[Path]) -> None:
    step = GenerativeModule.training_step

    def wrong(module: GenerativeModule, item: TrainItem, batch_idx: int) -> dict[str, Any]:
        found = step(module, item, batch_idx)
        return {**found, "loss": found["loss"] * (math.nan if rank == 1 and item[1].step == 2 else 1)}

    GenerativeModule.training_step = wrong  # type: ignore[method-assign]
    of_one(rank, 2, port, runs)


@pytest.mark.slow
def test_a_step_that_is_not_finite_in_one_process_is_skipped_by_all(tmp_path: Path) -> None:
    options = ["model=nit_tiny", "trainer.precision=bf16"]
    runs = [prepared(tmp_path / name, 2, *options, f"strategy={name}") for name in ("ddp", "fsdp")]
    spawn(with_a_gradient_that_is_not_finite, free_port(), runs)
    for run in runs:
        assert curve(run, "train/skipped") == [0, 0, 1, 0, 0, 0]
        assert '"step": 2' in (run / "nonfinite.jsonl").read_text()
        assert all(values.isfinite().all() for values in weights_of(run).values())
    assert curve(runs[1], "val/loss") == pytest.approx(curve(runs[0], "val/loss"), rel=1e-4)
