from __future__ import annotations

import os
import pickle
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from genfound.data.images.base import LatentSource
from genfound.data.images.imagenet import ImageTree
from genfound.data.images.pixels import normalised, to_picture
from genfound.data.images.views import ImageViews
from genfound.data.latents import safetensors_io
from genfound.data.latents.manifest import MANIFEST, read_manifest, write_manifest
from genfound.data.latents.store import ShardWriter, Store, read_index, verify
from tests.stores import contents, encoded, native, tree


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the images and, once encoded, a store of each kind."""
    root = tmp_path_factory.mktemp("made")
    images = tree(root / "images")
    encoded(images, root / "native", "data.holdout=3", "dtype=fp32")
    encoded(images, root / "mixed", "data=imagenet_mixed", "data.size=32", "data.flip=false")
    encoded(images, root / "flexible", "data=imagenet_flexible", "data.size=48")
    encoded(images, root / "kl", "tokenizer=sd_vae", "tokenizer.weights=random_tiny", "patch_size=1", "dtype=bf16")
    return root


def opened(root: Path, views: ImageViews | None = None, split: str = "train", mirrored: bool = False) -> Store:
    return Store(root, views or native(), 3 if root.name == "native" else None, split, mirrored)


def images(root: Path, view: str, size: int, holdout: int | None = None, split: str = "train") -> ImageTree:
    where: dict[str, Any] = {"root": str(root / "images"), "index": str(root / "index"), "max_pixels": None}
    return ImageTree(**where, views=ImageViews(view, size, 8, 4096), holdout=holdout, check="header", split=split)


def latent(source: ImageTree, index: int) -> Tensor:
    return normalised(to_picture(source.image(index)))


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_store_holds_what_the_images_hold(made: Path, split: str) -> None:
    stored, source = opened(made / "native", split=split), images(made, "native", 32, 3, split)
    assert isinstance(stored, LatentSource)
    assert stored.class_names == source.class_names
    assert np.array_equal(stored.labels, source.labels) and stored.labels.dtype == np.int64
    assert np.array_equal(stored.sizes, source.sizes) and stored.sizes.dtype == np.int64
    for index in range(len(source.labels)):
        assert torch.equal(stored.moments(index, False), latent(source, index))
        assert torch.equal(stored.moments(index, True), latent(source, index).flip(-1))


@pytest.mark.parametrize(
    ("store", "view", "size"),
    [("mixed", "mixed", 32), ("mixed", "native", 32), ("mixed", "square", 32), ("mixed", "square", 64),
     ("flexible", "flexible", 48)],
)  # fmt: skip
def test_views_are_those_of_the_images_and_in_their_order(made: Path, store: str, view: str, size: int) -> None:
    stored, source = opened(made / store, ImageViews(view, size, 8, 4096)), images(made, view, size)
    assert np.array_equal(stored.sizes, source.sizes)
    assert np.array_equal(stored.labels, source.labels)
    for index in range(0, len(source.labels), 5):
        assert torch.allclose(stored.moments(index, False).float(), latent(source, index), rtol=0, atol=5e-4)


def test_each_image_has_one_entry_in_each_of_its_views(made: Path) -> None:
    shard = safe_open(made / "flexible/train-00000.safetensors", "np")
    pairs = list(zip(shard.get_tensor("images").tolist(), shard.get_tensor("rules").tolist(), strict=True))
    assert len(set(pairs)) == len(pairs) and pairs == sorted(pairs)
    assert {image for image, _ in pairs} == set(range(7))
    assert read_manifest(made / "flexible")["views"] == ["resized-48", "48"]


def test_shards_are_safetensors_with_flat_values_and_offsets(made: Path) -> None:
    with safe_open(made / "kl/train-00000.safetensors", "pt") as shard:
        columns = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118, not a dict
    values, offsets, sizes = columns["values"], columns["offsets"], columns["sizes"]
    assert values.dtype == torch.bfloat16 and values.ndim == 1
    assert (offsets.diff() == 2 * 8 * sizes.prod(dim=1)).all() and offsets[-1] == len(values)
    names = bytes(columns["names"].tolist()).decode().split("\0")
    assert names == [f"n{c:02d}/{i:03d}.png" for c, i in [*((0, i) for i in range(0, 18, 3)), (1, 1)]]
    first = values[: offsets[1]].view(2, 8, *sizes[0])
    stored = opened(made / "kl")
    assert torch.equal(stored.moments(0, False), first[0])
    assert torch.equal(stored.moments(0, True), first[1])


def test_the_manifest_knows_the_statistics_of_the_training_means(made: Path) -> None:
    manifest, stored = read_manifest(made / "kl"), opened(made / "kl")
    means = [stored.moments(i, False)[:4].double().flatten(1) for i in range(len(stored.labels))]
    every = torch.cat(means, dim=1)
    assert torch.allclose(torch.tensor(manifest["statistics"]["mean"]).double(), every.mean(1), rtol=1e-9)
    assert torch.allclose(torch.tensor(manifest["statistics"]["std"]).double(), every.std(1, correction=0), rtol=1e-6)
    assert manifest["tokenizer"]["moments"] == ["mean", "logvar"]
    assert manifest["tokenizer"]["scale"] == 0.18215
    report = "\n".join(stored.report())
    assert "18 latents of 3 classes, 32 x 40 to 96 x 88 pixels" in report
    assert "encoded by sd_vae, mean and logvar in bf16, also mirrored" in report


def test_forked_workers_read_the_same(made: Path) -> None:
    """Spawned ones get copies, see below."""
    store = opened(made / "native")
    every, plain = range(len(store.labels)), [False] * len(store.labels)
    expected = list(map(store.moments, every, plain))  # descriptors are open now
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        assert all(map(torch.equal, pool.map(store.moments, every, plain), expected))
    assert all(map(torch.equal, map(store.moments, every, plain), expected))


def test_copies_open_their_own_files(made: Path) -> None:
    store = opened(made / "native")
    store.moments(0, False)
    copy = pickle.loads(pickle.dumps(store))
    assert copy._reader._open == {}
    assert torch.equal(copy.moments(0, False), store.moments(0, False))


def test_few_files_are_open_at_a_time(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_io, "MOST_OPEN", 1)
    store, before = opened(made / "native"), len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for index in (0, 11, 0, 11):
        store.moments(index, False)
    assert len(os.listdir("/proc/self/fd")) == before + 1  # noqa: PTH208
    del store
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


@pytest.mark.parametrize("most_open", [1, 512])
def test_threads_share_a_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most_open: int) -> None:
    """Two open the same file at once, and one closes what another reads from."""
    monkeypatch.setattr(safetensors_io, "MOST_OPEN", most_open)
    files = [tmp_path / str(number) for number in range(4)]
    for number, file in enumerate(files):
        file.write_bytes(bytes([number] * 64))
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            for _ in range(50):
                reader = safetensors_io.Reader(files)
                read = pool.map(reader.read, [0, 1, 2, 3] * 8, [32] * 32, [8] * 32)
                assert list(read) == [bytes([number] * 8) for number in [0, 1, 2, 3] * 8]
    finally:
        sys.setswitchinterval(interval)


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "native", tmp_path / "native"))


def flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 0x40
    file.write_bytes(data)


def test_any_flipped_byte_is_found_and_named(copy: Path) -> None:
    file = copy / "train-00001.safetensors"
    whole = file.read_bytes()
    for place in [0, 8, 30, len(whole) - 1, *np.random.default_rng(0).integers(0, len(whole), 60).tolist()]:
        flip(file, place)
        with pytest.raises(ValueError, match=r"train-00001\.safetensors .*makes this shard anew"):
            verify(file)
        file.write_bytes(whole)
    verify(file)


def test_files_are_read_however_little_comes_at_a_time(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a shard of 2 GiB, of which the kernel gives less in one call."""
    store, file, pread = opened(copy), copy / "train-00001.safetensors", os.pread
    expected = store.moments(9, True)
    sizes: list[int] = []

    def little(descriptor: int, count: int, begin: int) -> bytes:
        sizes.append(count)
        return pread(descriptor, min(count, 100), begin)

    monkeypatch.setattr(os, "pread", little)
    monkeypatch.setattr(safetensors_io, "PIECE", 1000)
    assert torch.equal(store.moments(9, True), expected)
    index = verify(file)
    assert len(index.columns["labels"]) == 5 and max(sizes) == 1000
    flip(file, index.values[""].begin + index.values[""].bytes - 1)
    with pytest.raises(ValueError, match=r"train-00001\.safetensors is damaged: entry 4 has not the checksum"):
        verify(file)


def test_a_flipped_value_is_found_when_it_is_read(copy: Path) -> None:
    header = safetensors_io.read_header(copy / "train-00000.safetensors")
    flip(copy / "train-00000.safetensors", header.spans["values"].begin + 10)
    store = opened(copy)
    store.moments(1, False)
    with pytest.raises(ValueError, match=r"train-00000\.safetensors is damaged: entry 0 has not the checksum"):
        store.moments(0, False)


def test_a_flipped_byte_of_the_index_is_found_when_the_store_is_opened(copy: Path) -> None:
    header = safetensors_io.read_header(copy / "train-00000.safetensors")
    flip(copy / "train-00000.safetensors", header.spans["labels"].begin)
    with pytest.raises(ValueError, match=r"train-00000\.safetensors is damaged: its index has not the checksum"):
        opened(copy)


def test_a_cut_a_missing_and_a_foreign_shard_are_named(copy: Path, made: Path) -> None:
    file = copy / "train-00001.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"train-00001\.safetensors has [\d,]+ bytes, not [\d,]+"):
        opened(copy)
    for length in (3, 200):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"train-00001\.safetensors is damaged: its header cannot be read"):
            verify(file)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"train-00001\.safetensors is missing"):
        opened(copy)
    shutil.copy(made / "mixed/train-00001.safetensors", file)
    with pytest.raises(ValueError, match=r"train-00001\.safetensors has"):
        opened(copy)


def test_a_store_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data\.root=.* is no latent store: it has no manifest\.json"):
        opened(tmp_path)
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        opened(tmp_path)
    (tmp_path / MANIFEST).write_text('{"format": "genfound latents 9"}')
    with pytest.raises(ValueError, match=r"manifest\.json is of format genfound latents 9, not genfound latents 2"):
        opened(tmp_path)


def test_an_incomplete_store_is_refused(copy: Path) -> None:
    write_manifest(copy, {**read_manifest(copy), "shards": None})
    with pytest.raises(ValueError, match=r"is not complete; give the command that encodes it again"):
        opened(copy)


@pytest.mark.parametrize(
    ("store", "views", "mirrored", "message"),
    [
        ("native", ImageViews("mixed", 32, 8, 4096), False, r"holds native, and data\.view=mixed needs 32 and 64"),
        ("mixed", native(), True, r"holds no mirrored latents; encode with data\.flip=true, or data\.flip=false"),
        ("native", native(16), False, r"do not divide into tokens of 16 pixels; encode with patch_size=16"),
        ("native", native(8, 50), False, r"holds images of 96 tokens; raise data\.max_tokens"),
        ("flexible", ImageViews("square", 48, 8, 4096), False, r"encoded for data\.view=flexible; not every image has"),
    ],
    ids=["view", "mirrored", "unit", "tokens", "incomplete view"],
)
def test_a_store_that_does_not_fit_is_refused(
    made: Path, store: str, views: ImageViews, mirrored: bool, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        opened(made / store, views, mirrored=mirrored)


def test_another_holdout_is_refused(made: Path) -> None:
    with pytest.raises(ValueError, match=r"encoded with data\.holdout=3, not 4"):
        Store(made / "native", native(), 4, "train", False)


def test_a_shard_that_names_another_store_or_split_is_refused(copy: Path) -> None:
    manifest = read_manifest(copy)
    write_manifest(copy, {**manifest, "patch_size": 4})
    with pytest.raises(ValueError, match=r"train-00000\.safetensors is not the one that the manifest describes"):
        opened(copy)
    lines = [{**line, "file": line["file"].replace("val-", "train-0")} for line in manifest["shards"]]
    (copy / "val-00000.safetensors").rename(copy / "train-000000.safetensors")
    write_manifest(copy, {**manifest, "shards": lines})
    with pytest.raises(ValueError, match=r"train-000000\.safetensors is not the one that the manifest describes"):
        opened(copy)


def test_the_fingerprint_is_that_of_the_store(made: Path, copy: Path) -> None:
    first = opened(made / "native").fingerprint
    assert first == opened(copy).fingerprint != opened(made / "mixed").fingerprint
    manifest = read_manifest(copy)
    write_manifest(copy, {**manifest, "source": {**manifest["source"], "root": "elsewhere"}})
    assert opened(copy).fingerprint == first


def test_images_shown_by_others_are_in_the_note_and_the_report(made: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(made / "images", tmp_path / "images"))
    broken = root / "train/n01/004.png"
    broken.write_bytes(broken.read_bytes()[:60])
    whole, again = (encoded(root, tmp_path / name, "data.flip=false") for name in ("one", "two"))
    notes = [read_index(file).note["replaced"] for file in sorted(whole.glob("*.safetensors"))]
    assert notes == [{}, {"n01/004.png": "n01/007.png"}, {}]
    assert [line["replaced"] for line in read_manifest(whole)["shards"]] == [0, 1, 0]
    assert contents(whole) == contents(again)  # also where the file was reported before
    source = Store(whole, native(), None, "train", False)
    assert any("1 show others of their class" in line for line in source.report())
    assert not any("show others" in line for line in opened(made / "mixed", native()).report())


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    columns = {"sizes": np.ones((1, 2)), "labels": [0], "images": [0], "rules": [0]}
    filling = ShardWriter({k: np.array(v) for k, v in columns.items()}, ["a"], 3, 3, 1, torch.float16)
    filling.put([0], torch.ones(1, 1, 3, 1, 1))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        filling.write(tmp_path / "train-00000.safetensors", {})
    assert list(tmp_path.rglob("*.safetensors")) == []
