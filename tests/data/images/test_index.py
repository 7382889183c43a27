from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from genfound.data.images.imagenet import ImageTree
from genfound.data.images.index import FileIndex
from tests.stores import native, tree


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three classes of five images."""
    return tree(tmp_path / "images", 15)


def opened(root: Path) -> ImageTree:
    options = {"views": native(), "holdout": None, "max_pixels": None, "check": "header", "split": "train"}
    return ImageTree(root=str(root), index=str(root.parent / "index"), **options)  # type: ignore[arg-type]


def test_links_that_lead_nowhere_or_to_folders_are_skipped_and_named(images: Path) -> None:
    train = images / "train"
    (train / "n01/gone.JPEG").symlink_to(images / "nowhere.png")
    (train / "n01/loop").symlink_to("loop")
    (train / "n02/deeper").symlink_to(train / "n00")
    (train / "n02/good.png").symlink_to(train / "n00/000.png")
    os.mkfifo(train / "n02/pipe.png")
    report = "\n".join(opened(images).report())
    assert "16 images of 3 classes" in report and "4 skipped" in report
    assert "n01/gone.JPEG: a link that leads nowhere" in report
    assert "n01/loop: a link that leads nowhere" in report
    assert "n02/deeper: a link to a folder, which is not followed; only a class may be one" in report
    assert "n02/pipe.png: not a regular file" in report
    shutil.copy(train / "n00/000.png", images / "nowhere.png")
    assert "n01/gone.JPEG" in opened(images).files


def test_a_class_may_be_a_link_that_leads_somewhere(images: Path) -> None:
    shutil.move(images / "train/n02", images / "elsewhere")
    (images / "train/n02").symlink_to(images / "elsewhere")
    assert len(opened(images).files) == 15
    shutil.move(images / "elsewhere", images / "gone")
    with pytest.raises(FileNotFoundError, match=r"n02 is a link that leads nowhere, perhaps of a class; mend or"):
        opened(images)


def test_workers_get_only_what_they_need(images: Path) -> None:
    source = opened(images)
    copy = pickle.loads(pickle.dumps(source))
    assert not hasattr(copy, "found") and not hasattr(copy, "sizes")
    assert np.array_equal(copy.image(7), source.image(7)) and copy.labels.tolist() == source.labels.tolist()
    assert source.files[7] == "n01/007.png"
    (images / "train/n01/007.png").write_bytes(b"")
    assert np.array_equal(copy.image(7), source.image(7))
    assert source.stand_ins == copy.stand_ins == {7: 8}
    assert any("1 replaced by others of their class" in line for line in source.report())


def test_an_index_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = FileIndex(["a/b.png"], [3], [4], [5], [6], {"a/b.png": ["odd"]}, {}, {".gif": 1})
    file = tmp_path / "index.json"
    found.save(file)
    whole = file.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        found.save(file)
    assert list(tmp_path.iterdir()) == [file] and file.read_bytes() == whole
