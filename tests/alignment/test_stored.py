"""What teachers see, out of a latent store: as if they had been asked, or refused in a line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from genfound import build
from genfound.data.latents.manifest import MANIFEST, read_manifest
from genfound.data.latents.store import Store, verify
from genfound.data.packing.batch_plan import MicroBatch
from genfound.encoding import encode
from tests.helpers import composed
from tests.stores import contents, encoded, native, tree

TEACHER = ["alignment=irepa", "alignment.teachers.dinov2.weights=random_tiny", "alignment.teachers.dinov2.width=32"]
MODEL = ["model=nit_tiny", "model.patch_size=8", "alignment.depth=2", "data.num_workers=0"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tree(tmp_path_factory.mktemp("stored") / "images")


@pytest.fixture(scope="module")
def whole(images: Path) -> Path:
    pytest.importorskip("transformers")
    return encoded(images, images.parent / "whole", "features_dtype=fp32", "dtype=fp32", "data.flip=true", *TEACHER)


def run(data: Path, *overrides: str) -> build.RunComponents:
    own = ["data=latent_store"] if (data / MANIFEST).exists() else ["data=imagenet_native"]
    return build.build_run(composed(*MODEL, *own, f"data.root={data}", *TEACHER, *overrides), 1)


def seen(parts: build.RunComponents, *indices: int) -> tuple[torch.Tensor, ...]:
    """What the teachers see in the images of a micro-batch, some of them mirrored."""
    micro = MicroBatch(len(indices), (0,) * len(indices), indices, 0, 0, 1.0, 0)
    images, _ = parts.loader(0).batches[micro]
    assert parts.teachers is not None and not isinstance(images, torch.Tensor)
    if images.features is not None:
        return parts.teachers.read(images.features, parts.layout, torch.device("cpu"))
    return parts.teachers(images.images, parts.layout, parts.unit, torch.device("cpu"))


def test_stored_features_are_those_that_teachers_compute(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit, where as many images were encoded together; products of matrices depend on that."""
    monkeypatch.setattr(encode, "PIXELS", 1)
    store = encoded(images, tmp_path / "store", "features_dtype=fp32", "data.flip=true", *TEACHER)
    stored, computed = run(store), run(images, "data.flip=true")
    assert stored.teachers is not None and stored.teachers.stored == ("dinov2",)
    for index in range(6):
        assert torch.equal(*seen(stored, index), *seen(computed, index))
    torch.testing.assert_close(seen(stored, 4, 1, 2, 0, 4), seen(computed, 4, 1, 2, 0, 4), rtol=0, atol=2e-6)


def test_a_compact_dtype_is_its_rounding(images: Path, whole: Path, tmp_path: Path) -> None:
    half = encoded(images, tmp_path / "half", "data.flip=true", *TEACHER)
    assert read_manifest(half)["features"]["dtype"] == "fp16"
    exact, rounded = (Store(folder, native(), None, "train", True) for folder in (whole, half))
    for index in range(len(exact.labels)):
        for flip in (False, True):
            (a,), (b,) = (store.features(index, flip, ["dinov2"]) for store in (exact, rounded))
            assert torch.equal(a.half(), b)


def test_mirror_images_have_features_of_their_own(whole: Path) -> None:
    (plain,), (mirrored,) = (Store(whole, native(), None, "train", True).features(0, f, ["dinov2"]) for f in (0, 1))
    assert not torch.equal(plain, mirrored) and not torch.equal(plain.flip(-1), mirrored)


def test_the_manifest_knows_the_teacher(whole: Path) -> None:
    held = read_manifest(whole)["features"]
    assert held["token_pixels"] == held["seen_pixels"] == 8 and held["dtype"] == "fp32"
    teacher = held["teachers"]["dinov2"]
    assert teacher["digest"] == teacher["weights"] == "random_tiny" and teacher["width"] == 32


def test_a_store_without_teachers_is_as_before(images: Path, tmp_path: Path) -> None:
    store = encoded(images, tmp_path / "plain")
    assert "features" not in read_manifest(store)
    with pytest.raises(
        ValueError, match=r"alignment: data.root=.* holds no features of teachers; give genfound.encode"
    ):
        run(store)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["alignment.teachers.dinov2.width=64"], "alignment.teachers.dinov2: data.root=.* another one, dinov2 "),
        (["alignment.teachers.dinov2.weights=facebook/dinov2-base"], "alignment.teachers.dinov2: .*random_tiny"),
        (["model.patch_size=4"], "model.patch_size: .* 8 pixels per token, .* asks for 4"),
        (["alignment.pixels=16"], "alignment.pixels: .* 8 pixels per token, .* asks for 16"),
        (["alignment.features=compute"], "alignment: teachers see images"),
        (["alignment.features=read"], "alignment.features=read is unknown"),
    ],
)
def test_other_features_are_refused(
    whole: Path, overrides: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(whole, *overrides)


def test_images_have_none_stored(images: Path) -> None:
    with pytest.raises(ValueError, match=r"alignment.features=stored reads features, and data have none; choose data="):
        run(images, "alignment.features=stored")


def test_weights_are_told_apart_by_their_values(images: Path, tmp_path: Path) -> None:
    """Folders of any name, with the same weights or others."""
    from genfound.alignment.dinov2 import DINOv2

    for name, factor in (("a", 1.0), ("same", 1.0), ("other", 2.0)):
        DINOv2(weights="random_tiny").model.save_pretrained(tmp_path / name)
        file = tmp_path / name / "model.safetensors"
        save_file({key: factor * value for key, value in load_file(file).items()}, file, {"format": "pt"})
    named = [*TEACHER, f"alignment.teachers.dinov2.weights={tmp_path / 'a'}"]
    store = encoded(images, tmp_path / "store", *named)
    same = f"alignment.teachers.dinov2.weights={tmp_path / 'same'}"
    assert run(store, same).teachers.stored == ("dinov2",)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"alignment.teachers.dinov2: .* the features of another one, dinov2 "):
        run(store, f"alignment.teachers.dinov2.weights={tmp_path / 'other'}")


@pytest.mark.parametrize("damage", ["flip", "cut", "missing"])
def test_damaged_features_are_named_and_made_anew(
    images: Path, whole: Path, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Path(shutil.copytree(whole, tmp_path / "store"))
    file = store / "train-00000.safetensors"
    data = bytearray(file.read_bytes())
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    data[8 + int.from_bytes(data[:8], "little") + header["values/dinov2"]["data_offsets"][0]] ^= 1
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(data if damage == "flip" else data[:-1])
    error = {
        "flip": "entry 0 of the features of dinov2 has not the checksum",
        "cut": "bytes, not",
        "missing": "missing",
    }
    with pytest.raises((ValueError, FileNotFoundError), match=rf"{file} .*{error[damage]}.*encoded the store makes"):
        Store(store, native(), None, "train", True).features(0, False, ["dinov2"])
    if damage == "flip":
        with pytest.raises(ValueError, match="features of dinov2"):
            verify(file)
    encoded(images, store, "features_dtype=fp32", "dtype=fp32", "data.flip=true", *TEACHER)
    assert contents(store) == contents(whole)


def test_encoding_goes_on_and_refuses_another_teacher(images: Path, whole: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    for rank in (1, 0):
        options = ["features_dtype=fp32", "dtype=fp32", "data.flip=true"]
        encoded(images, store, *options, *TEACHER, rank=rank, ranks=2)
    assert contents(store) == contents(whole)
    for other in (["alignment=none"], [*TEACHER, "alignment.pixels=14"], [*TEACHER, "features_dtype=bf16"]):
        with pytest.raises(ValueError, match=r"was begun with other settings or images .*features"):
            encoded(images, store, *options[1:], "features_dtype=fp32", *other)


def test_teachers_may_see_more_pixels(images: Path, tmp_path: Path) -> None:
    store = encoded(images, tmp_path / "store", *TEACHER, "alignment.pixels=14", "features_dtype=fp32")
    parts = run(images, "alignment.pixels=14", "data.flip=false")
    micro = MicroBatch(0, (3, 1), (0, 1), 0, 0, 1.0, 0)
    shown = parts.loader(0).batches[micro][0].pictures  # type: ignore[union-attr]
    assert shown and parts.teachers
    wanted = parts.teachers(shown, parts.layout, 14, torch.device("cpu"))
    stored = run(store, "alignment.pixels=14", "data.flip=false")
    read = stored.loader(0).batches[micro][0].features  # type: ignore[union-attr]
    assert read and stored.teachers
    torch.testing.assert_close(stored.teachers.read(read, parts.layout, torch.device("cpu")), wanted, rtol=0, atol=2e-6)


def test_a_step_that_is_not_aligned_reads_none(whole: Path) -> None:
    batches = run(whole, "alignment.every=2").loader(0).batches
    read = [batches[MicroBatch(k, (0,), (0,), 0, k, 1.0, 0)][0].features for k in (0, 1)]  # type: ignore[union-attr]
    assert read[0] is not None and read[1] is None


def test_features_have_a_known_dtype(images: Path, tmp_path: Path) -> None:
    assert set(encode.DTYPES) == {"fp16", "bf16", "fp32"}
    with pytest.raises(ValueError, match="features_dtype=int8 is unknown"):
        encoded(images, tmp_path / "store", *TEACHER, "features_dtype=int8")
