from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from genfound.data.images.views import resize
from genfound.data.latents.manifest import MANIFEST, read_manifest
from genfound.data.latents.store import Store, read_index
from genfound.encoding import encode
from genfound.encoding.encode import Encoding
from genfound.tokenizers import PixelTokenizer
from tests.helpers import composed
from tests.stores import contents, encoded, native, tree

TINY = ("tokenizer=dc_ae", "tokenizer.weights=random_tiny", "patch_size=1")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tree(tmp_path_factory.mktemp("encoding") / "images", 30)


@pytest.fixture(scope="module")
def whole(images: Path) -> Path:
    return encoded(images, images.parent / "whole")


def test_ranks_share_the_shards_and_the_last_one_completes(images: Path, whole: Path, tmp_path: Path) -> None:
    for rank in (2, 0, 1):
        assert not (tmp_path / "store").exists() or read_manifest(tmp_path / "store")["shards"] is None
        encoded(images, tmp_path / "store", rank=rank, ranks=3)
    assert contents(tmp_path / "store") == contents(whole)


@pytest.mark.parametrize(
    "damage", ["flip", "cut", "missing", "no picture", "no manifest", "bad manifest", "flipped manifest"]
)
def test_what_is_damaged_and_nothing_else_is_encoded_again(
    images: Path, whole: Path, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Path(shutil.copytree(whole, tmp_path / "store"))
    file, picture = store / "train-00001.safetensors", store / "train-00001.png"
    data = file.read_bytes()
    if damage == "flip":
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "cut":
        file.write_bytes(data[:-1])
    else:
        {"missing": file, "no picture": picture}.get(damage, store / MANIFEST).unlink()
    if damage == "bad manifest":
        (store / MANIFEST).write_text("{")
    if damage == "flipped manifest":
        (store / MANIFEST).write_text((whole / MANIFEST).read_text().replace('"n01"', '"n05"'))
    others = {f.name: f.stat().st_mtime_ns for f in store.glob("[!.]*.safetensors") if f != file}
    encoded(images, store)
    assert contents(store) == contents(whole)
    assert {name: (store / name).stat().st_mtime_ns for name in others} == others
    output = capsys.readouterr().out
    assert ("warning: " in output and "train-00001.safetensors is damaged" in output) == (damage in ("flip", "cut"))


def test_unfinished_files_of_killed_processes_are_cleared(images: Path, whole: Path, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir(parents=True)
    (tmp_path / "store/.partial-train-00000.safetensors").write_bytes(b"half")
    encoded(images, tmp_path / "store")
    assert contents(tmp_path / "store") == contents(whole)


class Counting(PixelTokenizer):
    """Remembers the batches it was given."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, ...]] = []

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        self.batches.append(tuple(images.shape))
        return images


def test_batches_are_of_one_size_and_never_cross_a_shard(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec = Counting()
    monkeypatch.setattr(encode.build, "tokenizer", lambda config: codec)
    encoded(images, tmp_path / "store", "data.flip=false")
    sizes = Store(tmp_path / "store", native(), None, "train", False).sizes
    expected = [np.unique(sizes[begin : begin + 7], axis=0, return_counts=True) for begin in range(0, 30, 7)]
    wanted = sorted(
        (int(n), 3, *map(int, size)) for found, counts in expected for size, n in zip(found, counts, strict=True)
    )
    assert sorted(codec.batches[1:]) == wanted  # the first one asks for the shape of a latent


def test_large_batches_are_split(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = Counting()
    monkeypatch.setattr(encode.build, "tokenizer", lambda config: codec)
    monkeypatch.setattr(encode, "PIXELS", 2 * 40 * 56)
    encoded(images, tmp_path / "store", "shard_images=100")
    assert max(count * h * w for count, _, h, w in codec.batches) <= max(2 * 2 * 40 * 56, 2 * 96 * 64)


def test_moments_and_statistics_are_unscaled(images: Path, tmp_path: Path) -> None:
    store = encoded(images, tmp_path / "store", *TINY, "dtype=fp32", "data.flip=true")
    config = composed("tokenizer=dc_ae", "tokenizer.weights=random_tiny")
    codec = encode.build.tokenizer(config)
    source = Store(store, native(32), None, "train", True)
    picture = resize(Image.open(images / "train/n00/000.png"), 32, 32, Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1
    stored = torch.stack([source.moments(0, False), source.moments(0, True)])
    expected = codec.moments(torch.stack([pixels, pixels.flip(-1)]))
    assert torch.allclose(stored, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    assert not torch.allclose(stored[0].flip(-1), stored[1], rtol=0, atol=0.01 * float(expected.abs().max()))
    facts = read_manifest(store)["tokenizer"]
    assert (facts["name"], facts["digest"], facts["scale"], facts["channels"]) == ("dc_ae", "random_tiny", 0.41407, 32)


def test_each_shard_has_a_picture_of_its_first_image_and_what_is_decoded(whole: Path, images: Path) -> None:
    assert sorted(f.stem for f in whole.glob("*.png")) == sorted(f.stem for f in whole.glob("[!.]*.safetensors"))
    pair = np.asarray(Image.open(whole / "train-00000.png"))
    left, right = np.split(pair, 2, axis=1)
    assert left.shape == (40, 56, 3)
    assert np.array_equal(left, right)


def test_latents_that_are_not_finite_are_named(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Large(PixelTokenizer):
        def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
            return images.sign() * 1e6

    monkeypatch.setattr(encode.build, "tokenizer", lambda config: Large())
    with pytest.raises(
        ValueError, match=r"n\d\d/\d+\.png: its latents are not finite in dtype=fp16; try another dtype"
    ):
        encoded(images, tmp_path / "store")
    assert not list((tmp_path / "store").glob("[!.]*.safetensors"))
    encoded(images, tmp_path / "store", "dtype=bf16")  # no shard is there yet, so that the folder is free
    encoded(images, tmp_path / "direct", "dtype=bf16")
    assert contents(tmp_path / "store") == contents(tmp_path / "direct")


def test_latents_that_are_not_finite_after_other_shards_need_another_folder(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Later(Counting):
        def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
            super().encode(images, noise)
            return images * (1e9 if len(self.batches) > 8 else 1)

    monkeypatch.setattr(encode.build, "tokenizer", lambda config: Later())
    with pytest.raises(ValueError, match=r"in dtype=fp16; try another dtype= and another out=$"):
        encoded(images, tmp_path / "store", "data.flip=false")
    with pytest.raises(ValueError, match=r"dtype: fp16 there, bf16 now"):
        encoded(images, tmp_path / "store", "data.flip=false", "dtype=bf16")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.flip=false"], r"mirrored: True there, False now"),
        (["dtype=bf16"], r"dtype: fp16 there, bf16 now"),
        (["shard_images=8"], r"shard_images: 7 there, 8 now"),
        (["data.holdout=2"], r"splits\.train\.images: 30 there, 15 now"),
        (["data.view=square", "data.size=32"], r"views: \['native'\] there, \['32'\] now"),
    ],
)
def test_other_settings_are_refused(images: Path, whole: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=rf"was begun with other settings or images \(.*{message}"):
        encoded(images, whole, *overrides)


def test_other_batches_are_other_bytes_and_refused(images: Path, tmp_path: Path) -> None:
    store = encoded(images, tmp_path / "store", *TINY)
    assert read_manifest(store)["tokenizer"]["pixels_per_call"] == 2**20
    with pytest.raises(ValueError, match=r"\(tokenizer\.pixels_per_call: 1048576 there, 5000 now\)"):
        encoded(images, store, *TINY, "tokenizer.pixels_per_call=5000")


def test_any_name_that_a_file_can_have_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [b"caf\xe9.png", b"line\nbreak.png", b"tab\t.png", "日.png".encode()]
    folder = tree(tmp_path / "images", 3) / "train/n00"
    for name in names:
        shutil.copy(os.fsencode(folder / "000.png"), os.fsencode(folder) + b"/" + name)
    (folder / os.fsdecode(b"bad\xe9\n.png")).touch()
    broken = folder / os.fsdecode(names[0])
    broken.write_bytes(broken.read_bytes()[:60])
    store = encoded(tmp_path / "images", tmp_path / "store")
    table = read_index(store / "train-00000.safetensors").columns["names"].tobytes().split(b"\0")
    own = sorted(os.fsdecode(name) for name in [b"000.png", *names])
    assert table == [b"n00/" + os.fsencode(name) for name in own] + [b"n01/001.png", b"n02/002.png"]
    output = capsys.readouterr().out
    assert r"n00/bad\udce9\n.png: the file is empty" in output
    assert "warning: 1 images could not be read, and the store has others of their class instead" in output
    assert r"  n00/caf\udce9.png: n00/line\nbreak.png is in its place" in output
    assert output.encode()


def test_a_class_of_any_name_can_be_encoded(tmp_path: Path) -> None:
    images = tree(tmp_path / "images", 3)
    (images / "train/n01").rename(images / "train" / os.fsdecode(b"n\xe9"))
    store = encoded(images, tmp_path / "store")
    source = Store(store, native(), None, "train", False)
    assert source.class_names == ["n00", "n02", os.fsdecode(b"n\xe9")]


def test_other_images_are_refused(images: Path, whole: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(images, tmp_path / "images"))
    before = contents(whole)
    encoded(moved, whole)  # the same files in another place are the same images
    assert contents(whole) == before
    (moved / "train/n00/000.png").unlink()
    with pytest.raises(ValueError, match=r"splits\.train\.images: 30 there, 29 now"):
        encoded(moved, whole)


def test_shards_of_another_store_are_kept(images: Path, whole: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(whole, tmp_path / "store"))
    (store / MANIFEST).unlink()
    with pytest.raises(ValueError, match=r"train-00000\.safetensors belongs to another store; choose another out="):
        encoded(images, store, "dtype=bf16")
    assert (store / "train-00000.safetensors").read_bytes() == (whole / "train-00000.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["dtype=int8"], "dtype=int8 is unknown; choose one of fp16, bf16, fp32"),
        (["shard_images=0"], "shard_images=0 must be a whole number of at least 1"),
        (["patch_size=0"], "patch_size=0 must be a whole number of at least 1"),
        (["data.holdout=0"], r"data\.holdout=0 must be a whole number of at least 2"),
        (["data=latent_store"], "data: only images can be encoded; choose data=image_folder or data=imagenet_native"),
    ],
)
def test_wrong_options_are_named(images: Path, tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encoded(images, tmp_path / "store", *overrides)
    assert not (tmp_path / "store").exists()


def test_drawn_images_can_be_encoded(tmp_path: Path) -> None:
    options = ["data=shapes", "data.images=20", "data.holdout=3", "tokenizer=pixel", "patch_size=2", "dtype=fp32"]
    config: dict[str, Any] = composed(*options, f"out={tmp_path}/store", name="encode")
    encode.encode(config, 0, 1, torch.device("cpu"))
    manifest = json.loads((tmp_path / "store/manifest.json").read_text())
    assert {split: facts["entries"] for split, facts in manifest["splits"].items()} == {"train": 20, "val": 3}
    source = Store(tmp_path / "store", native(2), 3, "val", False)
    drawn = Encoding(config, torch.device("cpu")).parts["val"]
    assert torch.equal(source.moments(1, False), drawn.read(1).float() / 127.5 - 1)
