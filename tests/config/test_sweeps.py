from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hydra
import pytest
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from genfound.config import compose, sweeps
from genfound.config.sweeps import Swept, swept_keys


def start(task: list[str], params: dict[str, Any] | None = None) -> list[str]:
    """The overrides for Hydra that the jobs of a sweep get."""
    overrides = {"task": task, "hydra": ["hydra.mode=MULTIRUN"]}
    config = OmegaConf.create(
        {"hydra": {"overrides": overrides, "sweeper": {"params": params}, "sweep": {"dir": "runs/a 'b'"}}}
    )
    OmegaConf.set_readonly(config.hydra, True)
    Swept([], None).on_multirun_start(config)
    assert OmegaConf.is_readonly(config.hydra)
    return list(config.hydra.overrides.hydra)


@pytest.mark.parametrize(
    ("task", "params", "keys"),
    [
        (["model=nit_s", "seed=0"], None, []),
        (["data.root=a,b", "seed=0"], None, ["data.root"]),
        (["trainer.precision=bf16,fp32", "seed=range(3)", "model=glob(nit*)"], None,
         ["model", "seed", "trainer.precision"]),
        (["data.root='a,b'", "ema.decays=[0.9,0.99]", "model.depth=1"], None, []),
        (["ema.decays=[0.9],[0.99]", "data.root='a b','a c'"], None, ["data.root", "ema.decays"]),
        (["seed=1"], {"optimizer.lr": "interval(0.1, 1)", "trainer.devices": "1,2", "model.depth": 3},
         ["optimizer.lr", "trainer.devices"]),
    ],
)  # fmt: skip
def test_what_a_sweep_varies(task: list[str], params: dict[str, Any] | None, keys: list[str]) -> None:
    assert job(start(task, params)) == keys


def job(overrides: list[str]) -> list[str]:
    """What a job finds that is composed with these overrides, as launchers compose it on any machine."""
    OverridesParser.create().parse_overrides(overrides)
    with hydra.initialize_config_dir(compose.config_dir(), version_base="1.3"):
        composed: DictConfig = hydra.compose(
            "train", [o for o in overrides if "hydra.mode" not in o], return_hydra_config=True
        )
    before = HydraConfig.instance().cfg
    composed.hydra.job.num = 0  # Hydra's own value is missing outside of a job
    HydraConfig.instance().set_config(composed)
    try:
        return swept_keys()
    finally:
        HydraConfig.instance().cfg = before


@pytest.mark.parametrize(("command", "given", "asked"), [
    ("train", ["trainer.devices=8", "trainer.num_nodes=2"], (2, 8)), ("train", [], (1, 1)),
    ("evaluate", ["devices=4"], (1, 4)), ("evaluate", [], (1, 1)), ("encode", ["devices=2"], (1, 2)),
    ("sample", [], (1, 1)),
])  # fmt: skip
def test_a_launcher_asks_for_what_each_command_is_given(command: str, given: list[str], asked: tuple[int, int]) -> None:
    with hydra.initialize_config_dir(compose.config_dir(), version_base="1.3"):
        cfg = hydra.compose(command, ["hydra/launcher=slurm_node", *given], return_hydra_config=True)
    assert (cfg.hydra.launcher.nodes, cfg.hydra.launcher.gpus_per_node) == asked


def test_outside_a_sweep_nothing_is_varied(tmp_path: Path) -> None:
    assert job([]) == []


def test_jobs_whose_launcher_fails_are_launched_again_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three jobs; the first was done, the second is killed twice, and the third waits for it."""
    monkeypatch.setattr(Swept, "here", Swept(["seed"], str(tmp_path / "notes")))
    jobs = [["seed=0"], ["seed=1"], ["seed=2"]]
    sweeps.announce(jobs)

    def told(job: list[str], **facts: Any) -> None:
        with (tmp_path / "notes").open("a") as out:
            out.write(json.dumps({"job": job, **facts}) + "\n")

    told(jobs[0], begun=1, ended="done", seconds=1)
    told(jobs[1], begun=1)
    assert sweeps.left(jobs, "SIGKILL") == jobs[1:]
    told(jobs[1], begun=2)
    assert sweeps.left(jobs[1:], "SIGKILL") == jobs[2:]
    assert sweeps.left(jobs[2:], "no worker begins") == []  # nothing was told since


def test_the_table_of_a_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Swept, "here", Swept(["seed"], str(tmp_path / "notes")))
    sweeps.announce([["model=nit_s", f"seed={seed}"] for seed in range(3)])
    sweeps.refuse(["model=nit_s", "seed=1", "hydra.verbose=true"], "no such thing")
    assert not sweeps.finish()
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "[failed] seed=1  no such thing",
        "job     ended      time       reason",
        "seed=0  not begun",
        "seed=1  failed     0 min 0 s  no such thing",
        "seed=2  not begun",
    ]
    assert not (tmp_path / "notes").exists()
