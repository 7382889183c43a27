"""Images in tars and in parquet files."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from genfound.data.images.archives import Archives
from genfound.data.images.imagenet import ImageTree
from genfound.data.images.parquet import ImageParquet
from genfound.data.images.tars import ImageTars
from tests.helpers import with_views

DEFAULTS: dict[str, Any] = {
    "holdout": None, "view": "native", "size": 16, "max_tokens": 64, "max_image_tokens": None, "max_pixels": None,
    "unit": 8, "split": "train",
}  # fmt: skip


def source(kind: type[Archives], root: Path, **options: Any) -> Archives:
    return kind(root=str(root), index=str(root.parent / "index"), **with_views({**DEFAULTS, **options}))


def picture(seed: int, height: int = 24, width: int = 32, kind: str = "PNG") -> bytes:
    drawn = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(drawn).save(data, kind)
    return data.getvalue()


def pixels(data: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(data)))


def tar(file: Path, members: dict[str, bytes]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file


def webdataset(root: Path) -> Path:
    """Two shards of training and one of validation, classes as numbers beside the images."""
    shards = {"train-000": [0, 2, 1], "train-001": [2, 2], "val/000": [1], "test-000": [-1]}
    for seed, (shard, labels) in enumerate(shards.items()):
        members = {}
        for number, label in enumerate(labels):
            members[f"x/{number}.0.png"] = picture(10 * seed + number)
            members |= (
                {f"x/{number}.cls": str(label).encode()}
                if number % 2
                else {f"x/{number}.json": json.dumps({"label": label, "size": 3}).encode()}
            )
        tar(root / f"{shard}.tar", members)
    return root


def test_tars_of_webdataset(tmp_path: Path) -> None:
    root = webdataset(tmp_path / "data")
    train, val = source(ImageTars, root), source(ImageTars, root, split="val")
    assert train.labels.tolist() == [0, 2, 1, 2, 2] and train.class_names == ["0", "1", "2"] == val.class_names
    assert val.labels.tolist() == [1] and train.sizes.tolist() == [[24, 32]] * 5
    seeds = [0, 1, 2, 10, 11]
    assert all(np.array_equal(train.image(k), pixels(picture(seed))) for k, seed in enumerate(seeds))
    assert np.array_equal(val.image(0), pixels(picture(20)))
    assert train.files[3] == "train-001.tar/x/0.0.png"
    assert "5 images of 3 classes" in train.report()[0]


def test_tars_of_classes_and_of_folders_are_the_tree_of_these_images(tmp_path: Path) -> None:
    """Views, labels and pixels alike."""
    images = {
        f"{name}/{name}_{k}.JPEG": picture(k, 40, 40 + 8 * k, "JPEG") for name in ("n01", "n02") for k in range(3)
    }
    for name, data in images.items():
        file = tmp_path / "tree/train" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    for wnid in ("n01", "n02"):
        own = {name.partition("/")[2]: data for name, data in images.items() if name.startswith(wnid)}
        tar(tmp_path / f"classes/{wnid}.tar", own)
    tar(tmp_path / "folders/all.tar", images | {"n02/notes.txt": b"no image", "n01/._x.JPEG": b"litter"})
    for view in ("square", "mixed"):
        options = {"view": view, "holdout": 3, "split": "val"}
        views = with_views({**DEFAULTS, **options, "check": "header"})
        tree = ImageTree(root=str(tmp_path / "tree"), index=str(tmp_path / "index"), **views)
        for name in ("classes", "folders"):
            tars = source(ImageTars, tmp_path / name, **options)
            assert tars.class_names == tree.class_names and np.array_equal(tars.labels, tree.labels)
            assert np.array_equal(tars.sizes, tree.sizes) and len(tars.labels) == {"square": 2, "mixed": 6}[view]
            assert all(np.array_equal(tars.image(k), tree.image(k)) for k in range(len(tars.labels)))


def test_what_is_found_in_archives_is_remembered_until_they_change(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root = webdataset(tmp_path / "data")
    first = source(ImageTars, root)
    assert "looking into 2 archive(s)" in capfd.readouterr().out
    assert source(ImageTars, root).fingerprint == first.fingerprint and not capfd.readouterr().out
    tar(root / "train-001.tar", {"0.png": picture(5), "0.cls": b"1"})
    again = source(ImageTars, root)
    assert again.labels.tolist() == [0, 2, 1, 1] and again.fingerprint != first.fingerprint


def test_unreadable_images_of_an_archive_are_skipped_and_named(tmp_path: Path) -> None:
    whole = picture(1)
    members = {"a.png": whole, "b.png": b"no image", "c.png": picture(2, 64, 64), "d.png": whole[:60] + bytes(20)}
    root = tar(tmp_path / "data/n01.tar", members).parent
    found = source(ImageTars, root, max_pixels=1000)
    assert len(found.labels) == 2 and "\n".join(found.report()).count("n01.tar/") == 2
    assert "more than data.max_pixels=1000" in "\n".join(found.report())
    with pytest.raises(ValueError, match=r"n01.tar: d.png cannot be read"):
        found.image(1)


def spoilt(root: Path, what: str) -> None:
    if what == "cut":
        file = root / "train-001.tar"
        file.write_bytes(file.read_bytes()[: -tarfile.RECORDSIZE // 2 - 6000])
    elif what == "no end":
        data = tar(root / "x.tar", {"a.png": picture(1), "a.cls": b"1"}).read_bytes()
        (root / "x.tar").write_bytes(data.rstrip(b"\0") + bytes(-len(data.rstrip(b"\0")) % 512))
    elif what == "compressed":
        with tarfile.open(root / "x.tar", "w:gz") as archive:
            archive.addfile(tarfile.TarInfo("a"))
    elif what == "no label":
        tar(root / "x.tar", {"n01/a.png": picture(1)})
    elif what == "no number":
        tar(root / "x.tar", {"a.png": picture(1), "a.cls": b"cat"})
    elif what == "label":
        tar(root / "x.tar", {"a.png": picture(1), "a.cls": b"-1"})
    elif what == "val":
        tar(root / "val/x.tar", {"a.png": picture(1), "a.cls": b"9"})
    else:
        for file in root.rglob("train*"):
            file.unlink()


SPOILT = {
    "cut": "train-001.tar is",
    "no end": "x.tar is cut short: it has no end",
    "compressed": "x.tar is no tar, is compressed, or is damaged",
    "no label": "images with the number of their class beside them, and others without",
    "no number": "a.cls is neither a number of a class",
    "label": "holds the label -1, which is no number of a class",
    "val": "class 9 is none of the 3 of the training archives",
    "no training": "holds no *.tar, but for validation or test",
}


@pytest.mark.parametrize("what", SPOILT)
def test_spoilt_tars_are_refused_in_a_line(what: str, tmp_path: Path) -> None:
    root = webdataset(tmp_path / "data")
    spoilt(root, what)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        source(ImageTars, root, split="val")
    assert SPOILT[what] in str(error.value) and "\n" not in str(error.value)


def test_parquet_needs_a_library_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train-0.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"needs pyarrow: pip install 'genfound\[parquet\]'"):
        source(ImageParquet, tmp_path / "data")


def parquet(
    file: Path, seeds: list[int], labels: list[int | None], names: list[str] | None = None, **columns: str
) -> None:
    """As the `datasets` library writes it, in groups of two rows."""
    arrow, writer = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    images = [{"bytes": picture(seed), "path": f"{seed}.png"} for seed in seeds]
    table = arrow.table({columns.get("image", "image"): images, columns.get("label", "label"): labels})
    if names is not None:
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        note = {"info": {"features": features}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(note)})
    file.parent.mkdir(parents=True, exist_ok=True)
    writer.write_table(table, file, row_group_size=2)


def test_parquet_of_hugging_face(tmp_path: Path) -> None:
    names = ["tench, Tinca tinca", "crane", "owl", "crane"]
    parquet(tmp_path / "data/train-00000-of-00002.parquet", [0, 1, 2, 3, 4], [0, 3, 2, 1, 0], names)
    parquet(tmp_path / "data/train-00001-of-00002.parquet", [5], [2], names)
    parquet(tmp_path / "data/validation-00000-of-00001.parquet", [6, 7], [1, 2], names)
    parquet(tmp_path / "data/test-00000-of-00001.parquet", [8], [-1], names)
    train, val = source(ImageParquet, tmp_path), source(ImageParquet, tmp_path, split="val")
    assert train.class_names == ["tench, Tinca tinca", "crane (1)", "owl", "crane (3)"] == val.class_names
    assert train.labels.tolist() == [0, 3, 2, 1, 0, 2] and val.labels.tolist() == [1, 2]
    order = [5, 0, 3, 1, 4, 2]
    assert all(np.array_equal(train.image(k), pixels(picture(k))) for k in order)
    assert np.array_equal(val.image(1), pixels(picture(7)))


def test_parquet_without_names_or_columns(tmp_path: Path) -> None:
    parquet(tmp_path / "a/train.parquet", [0, 1], [0, 4])
    assert source(ImageParquet, tmp_path / "a").class_names == ["0", "1", "2", "3", "4"]
    parquet(tmp_path / "b/train.parquet", [0], [0], image="img")
    with pytest.raises(ValueError, match="has no column image; its columns: img, label"):
        source(ImageParquet, tmp_path / "b")
    parquet(tmp_path / "c/train.parquet", [0, 1], [0, None])
    with pytest.raises(ValueError, match=r"train.parquet has no label in row 1; give every image"):
        source(ImageParquet, tmp_path / "c")
    (tmp_path / "a/train.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"train.parquet is no parquet file, or is damaged"):
        source(ImageParquet, tmp_path / "a")
