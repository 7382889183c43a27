"""A run that goes on with another configuration, on other images, or from a copy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import genfound
from genfound import training
from genfound.callbacks.resuming import HISTORY
from genfound.runtime import checkpoint_io, run_directory
from genfound.training import fit
from tests.cli.commands import TINY
from tests.helpers import composed

FOLDER = ["data=image_folder", "tokenizer=pixel", "data.max_image_tokens=64", "data.num_workers=0", "data.holdout=null"]


def go_on(folder: Path, *overrides: str, allow_changes: bool = True) -> None:
    """Train the run of a directory as the command line would."""
    allowed = [f"allow_changes={str(allow_changes).lower()}"]
    run_directory.write_config(folder, composed(*TINY, *allowed, *overrides), allow_changes)
    training.run(folder)


def lines(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def images(folder: Path, **classes: int) -> Path:
    """So many random images of 16 x 16 pixels in each class."""
    rng = np.random.default_rng(0)
    for name, count in classes.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / name / f"{i}.png")
    return folder


def newest(folder: Path) -> dict[str, Any]:
    file = checkpoint_io.newest(folder / "checkpoints")
    assert file is not None
    return checkpoint_io.read(file)


def test_a_run_with_another_global_step_counts_what_it_has_seen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for end, packs in ((3, 1), (5, 4), (7, 2)):
        go_on(tmp_path, f"trainer.max_steps={end}", f"batch.packs={packs}")
    seen = [line["images_seen"] for line in lines(tmp_path) if "train/loss" in line]
    per_pack = np.diff([0, *seen]) / [1, 1, 1, 4, 4, 2, 2]
    assert len(seen) == 7 and (per_pack >= 3).all() and (per_pack <= 5).all()
    history = lines(tmp_path, HISTORY)
    assert [(line["step"], line["key"], line["before"], line["now"]) for line in history] == [
        (3, "batch.packs", 1, 4),
        (5, "batch.packs", 4, 2),
    ]
    assert [line["images_seen"] for line in history] == [seen[2], seen[4]]
    assert f"changed at step 3 ({seen[2]} images): batch.packs was 1 and is 4 from here on" in capsys.readouterr().out
    assert run_directory.read_config(tmp_path)["batch"]["packs"] == 2


def test_settings_of_the_optimizer_are_those_of_the_configuration(tmp_path: Path) -> None:
    go_on(tmp_path, "trainer.max_steps=1")
    go_on(tmp_path, "trainer.max_steps=2", "optimizer.weight_decay=0.25", "optimizer.betas=[0.5,0.75]")
    group = newest(tmp_path)["optimizer_states"][0]["param_groups"][0]
    assert group["weight_decay"] == 0.25 and list(group["betas"]) == [0.5, 0.75]


REFUSED = {
    "model.depth=2": r"step-00000001\.ckpt does not fit NiT: .* a run keeps its network: choose another name=",
    "ema.decays=[0.5]": r"ema\.decays=\[0\.5\], but the checkpoint has only",
}


@pytest.mark.parametrize("change", REFUSED)
def test_a_change_that_does_not_fit_leaves_the_run_as_it_was(change: str, tmp_path: Path) -> None:
    go_on(tmp_path, "trainer.max_steps=1")
    before = (tmp_path / "config.yaml").read_text()
    with pytest.raises(ValueError, match=REFUSED[change]) as error:
        go_on(tmp_path, "trainer.max_steps=2", change)
    assert "\n" not in str(error.value)
    assert (tmp_path / "config.yaml").read_text() == before
    assert not (tmp_path / HISTORY).exists() and not (tmp_path / run_directory.NEXT).exists()
    go_on(tmp_path, "trainer.max_steps=2")
    assert run_directory.finished(tmp_path)


@pytest.mark.slow
def test_another_precision_is_refused_though_auto_stands_for_it(tmp_path: Path) -> None:
    go_on(tmp_path, "trainer.max_steps=1", "trainer.precision=fp32")
    go_on(tmp_path, "trainer.max_steps=2", "trainer.precision=fp32", allow_changes=False)
    with pytest.raises(ValueError, match=r"trainer\.precision: fp32 in the run, bf16 now"):
        go_on(tmp_path, "trainer.max_steps=3", "trainer.precision=bf16", allow_changes=False)
    config = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(config.replace("precision: fp32", "precision: auto"))
    with pytest.raises(ValueError, match=r"trainer\.precision=bf16 is bf16 here, and .* was trained with fp32; set"):
        go_on(tmp_path, "trainer.max_steps=3", "trainer.precision=bf16", allow_changes=False)
    go_on(tmp_path, "trainer.max_steps=3", "trainer.precision=bf16")
    assert [{**line, "images_seen": 0} for line in lines(tmp_path, HISTORY)] == [
        {"step": 2, "images_seen": 0, "key": "trainer.precision", "before": "fp32", "now": "bf16"}
    ]


@pytest.mark.slow
def test_a_folder_that_gained_an_image_continues_when_that_is_allowed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, run = images(tmp_path / "d", a=4, b=4), tmp_path / "runs/r"
    data = [*FOLDER, f"data.root={root}", f"data.index={tmp_path}/index"]
    go_on(run, *data, "trainer.max_steps=2", allow_changes=False)
    images(root, b=5)
    with pytest.raises(
        ValueError, match=r"data\.root: these are not the images that .* allow_changes=true to continue"
    ):
        go_on(run, *data, "trainer.max_steps=4", allow_changes=False)
    capsys.readouterr()
    go_on(run, *data, "trainer.max_steps=4")
    said = capsys.readouterr().out
    assert "images of the pass that has begun may be repeated or left out; every later pass shows each image" in said
    assert [line["key"] for line in lines(run, HISTORY)] == ["data.fingerprint"]
    go_on(run, *data, "trainer.max_steps=5", allow_changes=False)  # they are the run's now
    images(root, c=4)
    for allowed in (True, False):
        with pytest.raises(ValueError, match=r"has 3 classes and .* was trained on 2: .* name=\.\.\. init_from=.*/r$"):
            go_on(run, *data, "trainer.max_steps=6", allow_changes=allowed)


def test_a_finished_run_is_not_done_on_other_images(tmp_path: Path) -> None:
    one, moved, other = (images(tmp_path / name, a=4, b=count) for name, count in (("d", 4), ("e", 4), ("f", 5)))
    run = tmp_path / "runs/r"
    data = [*FOLDER, "trainer.max_steps=1", f"data.index={tmp_path}/index"]
    go_on(run, *data, f"data.root={one}", allow_changes=False)
    result = run_directory.finished(run)
    assert result is not None
    for root in (one, moved):
        training._check_images(run, composed(*TINY, *data, f"data.root={root}"), result)
    with pytest.raises(
        ValueError, match=r"is finished, and was trained on other images than those of data\.root=.*/f;"
    ):
        training._check_images(run, composed(*TINY, *data, f"data.root={other}"), result)


def test_a_copy_of_config_and_checkpoints_is_the_run(tmp_path: Path) -> None:
    """It samples, continues, and ends, though hidden files of macOS lie beside each of them."""
    run, copy = tmp_path / "run", tmp_path / "copy"
    go_on(run, "trainer.max_steps=2")
    copy.mkdir()
    shutil.copy(run / "config.yaml", copy)
    shutil.copytree(run / "checkpoints", copy / "checkpoints")
    for file in [copy / "config.yaml", *(copy / "checkpoints").iterdir()]:
        file.with_name(f"._{file.name}").write_bytes(b"\0\5\26\7\0\2\0\0Mac OS X        ")
    assert len(genfound.sample(genfound.load(copy), labels=[0], size=(8, 8))) == 1
    go_on(copy, "trainer.max_steps=2")
    assert run_directory.finished(copy) == {**(run_directory.finished(run) or {}), "loss": None}
    go_on(copy, "trainer.max_steps=3", "callbacks.checkpointing.keep=1")
    assert [line["step"] for line in lines(copy) if "train/loss" in line] == [3]
    assert sorted(file.name for file in (copy / "checkpoints").glob("[!.]*")) == ["step-00000003.ckpt"]


def test_a_full_disk_is_one_line_and_the_last_checkpoint_survives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on(tmp_path, "trainer.max_steps=1")
    before = (tmp_path / "checkpoints/step-00000001.ckpt").read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as context:
        context.setattr("torch.save", full)
        with pytest.raises(OSError, match=r"No space left on device: '.*step-00000002\.ckpt'"):
            go_on(tmp_path, "trainer.max_steps=2")
    assert (tmp_path / "checkpoints/step-00000001.ckpt").read_bytes() == before
    assert [file.name for file in (tmp_path / "checkpoints").iterdir()] == ["step-00000001.ckpt"]
    fit(tmp_path)
    assert newest(tmp_path)["global_step"] == 2
