from __future__ import annotations

import errno
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from genfound.data.latents.manifest import MANIFEST, read_manifest, write_manifest
from genfound.encoding.shard_plan import Shard
from genfound.encoding.store_writer import StoreWriter
from tests.stores import contents, encoded, tree


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("destination")
    return encoded(tree(root / "images"), root / "whole")


@pytest.fixture
def begun(whole: Path) -> dict[str, Any]:
    return {**read_manifest(whole), "statistics": None, "shards": None}


def shards(store: Path) -> list[Shard]:
    """As they were encoded: seven images in each."""
    assert len(read_manifest(store)["shards"]) == 3
    return [Shard("train", i, 7 * i, min(7 * i + 7, 18)) for i in range(3)]


def test_a_folder_without_a_shard_may_be_claimed_anew(begun: dict[str, Any], tmp_path: Path) -> None:
    StoreWriter(tmp_path / "store", {**begun, "dtype": "fp32"})
    (tmp_path / "store/train-00007.png").touch()  # of a process that was killed before its shard was there
    place = StoreWriter(tmp_path / "store", begun)
    assert read_manifest(tmp_path / "store")["dtype"] == "fp16"
    assert [file.name for file in place.out.iterdir()] == [MANIFEST]
    assert not place.begun and not place.was_complete


def test_a_folder_with_a_shard_keeps_its_manifest(whole: Path, begun: dict[str, Any], tmp_path: Path) -> None:
    store = Path(shutil.copytree(whole, tmp_path / "store"))
    with pytest.raises(ValueError, match=r"was begun with other settings or images \(dtype: fp16 there, fp32 now\)"):
        StoreWriter(store, {**begun, "dtype": "fp32"})
    (store / MANIFEST).write_text("{")
    with pytest.raises(ValueError, match=r"train-00000\.safetensors belongs to another store; choose another out="):
        StoreWriter(store, {**begun, "dtype": "fp32"})
    assert (store / MANIFEST).read_text() == "{"
    assert StoreWriter(store, begun).begun


def test_what_a_system_leaves_in_a_folder_does_not_make_it_another_one(begun: dict[str, Any], tmp_path: Path) -> None:
    for name in (".DS_Store", "Thumbs.db", "._train-00000.safetensors"):
        (tmp_path / name).touch()
    assert not StoreWriter(tmp_path, begun).begun


@pytest.mark.parametrize("name", ["notes.txt", MANIFEST, "train-00000.png"])
def test_what_is_no_store_is_left_alone(begun: dict[str, Any], tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"name": "a web page"}')
    with pytest.raises(ValueError, match=rf"holds {name} and is no latent store; choose another out="):
        StoreWriter(tmp_path, begun)
    assert (tmp_path / name).read_text() == '{"name": "a web page"}'


@pytest.mark.parametrize("below", ["", "/store"])
def test_a_file_in_the_way_is_named(begun: dict[str, Any], tmp_path: Path, below: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=rf"file{below} cannot be written: .*: see that .* can be written"):
        StoreWriter(tmp_path / f"file{below}", begun)


@pytest.mark.parametrize(
    ("code", "way"),
    [(errno.ENOSPC, "make room and give the same"), (errno.EFBIG, "make room and give the same"),
     (errno.EDQUOT, "make room and give the same"), (errno.EROFS, "see that .* can be written"),
     (errno.EACCES, "see that .* can be written")],
)  # fmt: skip
def test_the_way_out_is_that_of_the_error(begun: dict[str, Any], tmp_path: Path, code: int, way: str) -> None:
    place = StoreWriter(tmp_path / "store", begun)

    def fail() -> None:
        raise OSError(code, os.strerror(code))

    with pytest.raises(ValueError, match=rf"x cannot be written: {os.strerror(code)}; complete shards are safe: {way}"):
        place.write(fail, tmp_path / "store/x")


def test_of_several_that_find_it_complete_one_completes_it(whole: Path, begun: dict[str, Any], tmp_path: Path) -> None:
    store = Path(shutil.copytree(whole, tmp_path / "store"))
    every = shards(store)
    write_manifest(store, begun)
    places = [StoreWriter(store, begun) for _ in range(6)]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda place: place.complete(every), places))
    assert sorted(map(str, found)) == ["False"] * 5 + ["True"]
    assert contents(store) == contents(whole)


def test_a_missing_or_foreign_shard_is_still_to_be_written(whole: Path, begun: dict[str, Any], tmp_path: Path) -> None:
    store = Path(shutil.copytree(whole, tmp_path / "store"))
    every, file = shards(store), store / "train-00001.safetensors"
    place = StoreWriter(store, begun)
    shutil.copy(store / "train-00000.safetensors", file)
    assert place.complete(every) is None
    with pytest.raises(ValueError, match=r"train-00001\.safetensors belongs to another store"):
        place.finished(every[1])
    file.unlink()
    assert place.complete(every) is None and not place.finished(every[1])
