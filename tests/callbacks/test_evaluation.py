import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import Logger

from genfound import build, training
from genfound.callbacks.evaluation import Evaluation
from genfound.config import compose
from genfound.data.datamodule import GenerativeDataModule
from genfound.evaluation.protocol import read_results
from genfound.evaluation.samples import SampleStore
from genfound.loggers.json_lines import JsonLines
from genfound.modules.base import module_of
from genfound.runtime import run_directory
from tests.evaluation.runs import TINY, evaluated
from tests.helpers import run_dir

EVALUATED = {"every": 20, "protocol": "quick", "extractor": None, "extractor_weights": None}
ALONE = ("ema.decays=[0.9]", "callbacks.validation=null", "callbacks.preview=null", "trainer.log_every_n_steps=1")
FEW = {"n": 70, "reference_images": 100}


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    """The protocol `quick` with fewer samples."""
    composed = compose.compose
    monkeypatch.setattr(
        compose, "compose", lambda name, overrides: composed(name, overrides) | (FEW if name == "evaluate" else {})
    )


def trained(folder: Path, evaluate: bool, **settings: Any) -> dict[str, Any]:
    """A run of a few steps, with or without evaluations; its checkpoint."""
    run_dir(folder, *TINY, f"runs={folder.parent}", "trainer.precision=fp32", "trainer.max_steps=12", *ALONE)
    config = run_directory.read_config(folder)
    config["callbacks"]["evaluation"] |= EVALUATED | settings | ({} if evaluate else {"every": None})
    parts = build.build_run(config, 1)
    loggers: list[Logger] = [JsonLines(folder / "metrics.jsonl", 0)]
    trainer = training._trainer(folder, parts, 12, training._callbacks(config), loggers)
    trainer.fit(module_of(parts), datamodule=GenerativeDataModule(parts))
    return dict(torch.load(folder / "checkpoints/step-00000012.ckpt", weights_only=True))


def curve(folder: Path, key: str) -> list[float]:
    file = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [line[key] for line in lines if key in line]


def test_figures_are_logged_stored_and_do_not_disturb_the_training(tmp_path: Path) -> None:
    """What an interrupted evaluation has left is removed, and other work is not."""
    work = tmp_path / "watched/evaluations/work"
    for name in ("training/left", "of a command"):
        (work / name).mkdir(parents=True)
        (work / name / "images-000000.npy").touch()
    watched, plain = trained(tmp_path / "watched", True), trained(tmp_path / "plain", False)
    for key, tensor in plain["state_dict"].items():
        assert torch.equal(watched["state_dict"][key], tensor), key
    for key, tensor in plain["ema"]["0.9"].items():
        assert torch.equal(watched["ema"]["0.9"][key], tensor), key
    assert curve(tmp_path / "watched", "train/loss") == curve(tmp_path / "plain", "train/loss")
    distances = curve(tmp_path / "watched", "eval/fd_probe")
    assert len(distances) >= 2 and not curve(tmp_path / "plain", "eval/fd_probe")
    results = read_results(tmp_path / "watched")
    assert [result.figures["fd_probe"] for result in results] == distances
    protocol = results[0].protocol
    assert (protocol.name, protocol.count, protocol.size, protocol.drawing.weights) == ("quick", 70, "data", "ema")
    assert results[0].subject["images_seen"] < results[1].subject["images_seen"]
    assert results[0].subject["hash"] != results[1].subject["hash"]
    assert [file.name for file in work.iterdir()] == ["of a command"]


def test_samples_that_are_not_finite_do_not_end_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverge(*_: Any) -> None:
        raise FloatingPointError("an image is not finite")

    notes: list[str] = []
    monkeypatch.setattr(SampleStore, "draw", diverge)
    monkeypatch.setattr(JsonLines, "note", lambda _, text, step: notes.append(text))
    state = trained(tmp_path / "run", True)
    assert state["global_step"] == 12 and read_results(tmp_path / "run") == []
    assert "no evaluation: an image is not finite" in notes


@pytest.mark.slow
def test_the_command_measures_the_same_weights_alike(tmp_path: Path) -> None:
    state = trained(tmp_path / "run", True, every=1)
    last = read_results(tmp_path / "run")[-1]
    assert last.subject["images_seen"] == state["images_seen"]
    options = {"n": 70, "reference_images": 100, "out": str(tmp_path / "out")}
    again = evaluated(
        tmp_path / "run", tmp_path / ".references", protocol="quick", sizes="data", labels="data", **options
    )[0]
    assert again.subject["hash"] == last.subject["hash"]
    assert again.protocol.facts() == last.protocol.facts()
    assert again.figures == pytest.approx(last.figures, rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"protocol": "torch_fidelity", "extractor": "probe"},
            "convention=torch_fidelity is one of Inception",
        ),
        ({"protocol": "fast"}, "callbacks.evaluation.protocol=fast is unknown; choose one of adm_50k"),
        ({"extractor": "inception"}, "extractor_weights=weights-inception.* is not there"),
    ],
)
def test_wrong_settings_stop_the_run_before_it_trains(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        trained(tmp_path / "run", True, **settings)
    assert not curve(tmp_path / "run", "train/loss") and not list(tmp_path.rglob("*.ckpt"))


def test_the_work_of_another_protocol_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = []
    for seed in (0, 0, 1):
        monkeypatch.setitem(FEW, "seed", seed)
        folder = run_dir(tmp_path / "run", *TINY, f"runs={tmp_path}", "trainer.precision=fp32")
        parts = build.build_run(run_directory.read_config(folder), 1)
        evaluation = Evaluation(**EVALUATED)  # type: ignore[arg-type]
        trainer: Any = SimpleNamespace(default_root_dir=folder, datamodule=SimpleNamespace(parts=parts))
        evaluation.setup(trainer, module_of(parts), "fit")
        keys.append(evaluation.plans[0].of(parts.net, {}, tmp_path).work)
    assert keys[0] == keys[1] != keys[2]
