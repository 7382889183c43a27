"""The user's own command on an image tree like ImageNet's, with a net that trains in seconds."""

import shutil
from pathlib import Path

import pytest

from tests.cli.commands import genfound, one_error
from tests.photographs import CLASSES, write_tree

SMALL = [
    "model=nit_s", "alignment=none", "model.width=32", "model.depth=1", "model.heads=1", "data=imagenet_native",
    "data.root=images",
    "tokenizer.weights=random_tiny", "data.max_tokens=64", "batch.packs=1", "data.num_workers=1", "logger=jsonl",
    "name=run", "callbacks.validation.images=4",
]  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("imagenet")
    write_tree(root / "images", count=24, shrink=2)
    return root


@pytest.mark.slow
def test_the_tree_trains_reports_its_odd_files_and_resumes(images: Path) -> None:
    result = genfound("train", *SMALL, "trainer.max_steps=2", cwd=images)
    assert result.returncode == 0, result.stderr
    for line in (
        "30 images of 4 classes", "1 converted from CMYK to RGB", "1 converted from L to RGB",
        "1 of format PNG with the suffix .JPEG", "empty.JPEG", "reduced to 64 tokens",
        "latents of mean", "done: ",
    ):  # fmt: skip
        assert line in result.stdout, (line, result.stdout)
    again = genfound("train", *SMALL, "trainer.max_steps=3", cwd=images)
    assert again.returncode == 0, again.stderr
    assert "continuing from" in again.stdout and "in 3 steps" in again.stdout


def test_wrong_trees_are_one_clear_line(images: Path, tmp_path: Path) -> None:
    command = [*SMALL, "trainer.max_steps=1", f"runs={tmp_path}/runs"]
    root = tmp_path / "images"
    assert f"{root} is not a folder" in one_error(genfound("train", *command, f"data.root={root}", cwd=images))
    shutil.copytree(images / "images/train" / CLASSES[0], root / "train" / CLASSES[0])
    (root / "train/n00000000").mkdir()
    error = one_error(genfound("train", *command, f"data.root={root}", cwd=images))
    assert "n00000000 holds no image that can be read; fill or remove the folder" in error
    error = one_error(genfound("train", *command, "model.channels=4", cwd=images))
    assert error.startswith("error: tokenizer is dc_ae (32 channels) but model.channels is 4")
