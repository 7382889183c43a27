from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest

from genfound.data.images.names import Names, class_folders, remarks, shown
from genfound.runtime.files import visible

ODD = ["n01/a.png", "n01/ü 日.png", "n01/line\nbreak.png", os.fsdecode(b"n01/caf\xe9.png"), "n01/tab\t.png"]


def test_names_come_back_as_they_were() -> None:
    for names in (ODD, ["one"], []):
        kept = pickle.loads(pickle.dumps(Names(names)))
        assert [kept[i] for i in range(len(names))] == names
    assert Names(ODD).table == b"\0".join(map(os.fsencode, ODD))


def test_a_million_names_are_small() -> None:
    names = [f"n{i % 1000:08d}/n{i % 1000:08d}_{i}.JPEG" for i in range(20_000)]
    assert len(pickle.dumps(Names(names))) < 40 * len(names)


def test_any_name_can_be_printed_in_one_line() -> None:
    lines = [shown(name) for name in ODD]
    assert lines[:2] == ODD[:2]
    assert lines[2:] == ["n01/line\\nbreak.png", "n01/caf\\udce9.png", "n01/tab\\t.png"]
    assert all(line.encode() for line in lines)


def test_hidden_files_and_litter_are_not_visible(tmp_path: Path) -> None:
    for name in ("b.png", "a.png", "._a.png", ".DS_Store", "Thumbs.db", "thumbs.png", "__MACOSX", "Desktop.ini"):
        (tmp_path / name).touch()
    assert [path.name for path in visible(tmp_path)] == ["a.png", "b.png", "thumbs.png"]
    assert [path.name for path in visible(tmp_path, "a.*")] == ["a.png"]
    assert visible(tmp_path / "absent") == []


def folders(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).mkdir(parents=True)
    return root


@pytest.mark.parametrize(
    "names",
    [
        ("train", "val"), ("Train", "Test"), ("training", "validation", "testing"), ("train2017", "val2017"),
        ("train", "test", "annotations"), ("train_images", "test_images"), ("trainset",), ("test",), ("train", "dev"),
    ],
)  # fmt: skip
def test_splits_are_no_classes(tmp_path: Path, names: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=rf"by name are splits and no classes; give data\.root={tmp_path}/\w+, or"):
        class_folders(folders(tmp_path, *names))


def test_the_root_that_is_proposed_is_that_of_training(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=rf"Train and test by name .* give data\.root={tmp_path}/Train, or another name"
    ):
        class_folders(folders(tmp_path, "Train", "test"))


@pytest.mark.parametrize(
    "names", [("car", "train"), ("blood test", "other"), ("trainer", "valley"), ("development", "test"), ("a", "val")]
)
def test_classes_may_have_names_like_splits(tmp_path: Path, names: tuple[str, ...]) -> None:
    assert class_folders(folders(tmp_path, *names)) == sorted(names)


def test_labels_of_dataset_tool_are_not_passed_over(tmp_path: Path) -> None:
    root = folders(tmp_path, "00000", "00001")
    assert "warning: folders 00000, 00001 may be parts of a data set" in remarks(class_folders(root))[-1]
    (root / "dataset.json").write_text(json.dumps({"labels": [["00000/img00000000.png", 1]]}))
    with pytest.raises(ValueError, match=r"dataset\.json of dataset_tool is not read, and 00000 is no class; put the"):
        class_folders(root)
    folders(root, "cats")
    assert class_folders(root) == ["00000", "00001", "cats"]


@pytest.mark.parametrize("table", ["metadata.csv", "metadata.jsonl", "metadata.parquet"])
@pytest.mark.parametrize("place", [".", "cats"])
def test_labels_of_hugging_face_are_not_passed_over(tmp_path: Path, table: str, place: str) -> None:
    file = folders(tmp_path, "cats", "dogs") / place / table
    file.write_bytes(b"x" * 200_000 + b"file_name,label\n")
    with pytest.raises(ValueError, match=rf"{table} of Hugging Face's ImageFolder is not read; put the images into"):
        class_folders(tmp_path)
    file.write_text("author,year\n")
    assert class_folders(tmp_path) == ["cats", "dogs"]


def test_what_systems_leave_in_folders_is_no_class(tmp_path: Path) -> None:
    folders(tmp_path, "cats", ".git", "__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information")
    for name in ("._cats", ".DS_Store", "Thumbs.db", "desktop.ini"):
        (tmp_path / name).touch()
    (tmp_path / "._link").symlink_to(tmp_path / "nowhere")
    assert class_folders(tmp_path) == ["cats"]


def test_names_that_are_numbers_are_remarked(tmp_path: Path) -> None:
    names = class_folders(folders(tmp_path, *map(str, range(12))))
    assert names[:4] == ["0", "1", "10", "11"]
    assert remarks(names) == ["  classes are named by numbers, and a number is a name: labels=[9] is the folder 9"]
    assert not remarks([str(number) for number in range(10)]) and not remarks(["7", "cats"])
