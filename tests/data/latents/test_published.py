from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from genfound import build
from genfound.data.images.base import LatentSource, Rerendered, held_out
from genfound.data.images.views import ImageViews, center_crop, resize
from genfound.data.latents import va_vae
from genfound.data.latents.lightningdit import LightningDiTLatents
from genfound.data.latents.nit import NIT_SCALE, NiTLatents
from genfound.data.latents.repa import REPALatents
from genfound.data.latents.va_vae import STATISTICS, VAVAE, statistics
from genfound.data.packing.batch_plan import MicroBatch
from genfound.data.packing.loader import MicroBatches
from genfound.tokenizers import LatentSpec
from tests.helpers import composed

GRIDS = {"n01": [(3, 2), (2, 5), (1, 1)], "n07": [(4, 4), (2, 2)]}
LABELS = {"n01": 0, "n07": 2}
TYPES = {"native-resolution": None, "fixed-256x256": (8, 8), "fixed-512x512": (16, 16)}


def write_nit(root: Path) -> dict[tuple[str, str], Tensor]:
    """NiT's published layout; returns what was stored, by type and name."""
    generator = torch.Generator().manual_seed(0)
    stored, merged = {}, []
    (root / "data_meta").mkdir(parents=True)
    for kind, fixed in TYPES.items():
        lines = []
        for folder, grids in GRIDS.items():
            for i, grid in enumerate(grids):
                height, width = fixed or grid
                name = f"{folder}/{folder}_{i}.safetensors"
                latent = torch.randn(2, 32, height, width, generator=generator)
                file = root / f"dc-ae-{kind.removeprefix('fixed-')}" / name
                file.parent.mkdir(parents=True, exist_ok=True)
                save_file({"latent": latent, "label": torch.tensor(float(LABELS[folder]))}, file)
                stored[kind, name] = latent
                facts = {"image_file": f"{folder}/{folder}_{i}.JPEG", "latent_file": name, "type": kind}
                lines.append(json.dumps({**facts, "latent_h": height, "latent_w": width}) + "\n")
        (root / f"data_meta/dc-ae_{kind}_meta.jsonl").write_text("".join(lines))
        merged += lines
    (root / "data_meta/dc-ae_merge_meta.jsonl").write_text("".join(merged))
    return stored


def nit(
    root: Path, view: str = "native", size: int = 256, holdout: int | None = None, split: str = "train"
) -> NiTLatents:
    return NiTLatents(root, ImageViews(view, size, 32, 4096), holdout, split, True, LatentSpec(32, 32))


def test_nits_files_are_read_without_their_scale(tmp_path: Path) -> None:
    stored, source = write_nit(tmp_path), nit(tmp_path)
    assert isinstance(source, LatentSource)
    assert source.sizes.tolist() == [[32 * h, 32 * w] for grids in GRIDS.values() for h, w in grids]
    assert source.labels.tolist() == [0, 0, 0, 2, 2]
    assert source.class_names == ["n01", "1", "n07"]
    names = [f"{folder}/{folder}_{i}.safetensors" for folder, grids in GRIDS.items() for i in range(len(grids))]
    for index, name in enumerate(names):
        for mirrored in (False, True):
            moments = source.moments(index, mirrored)
            expected = stored["native-resolution", name][int(mirrored)]
            assert torch.allclose(moments * NIT_SCALE, expected, rtol=1e-6)
    assert "5 latents of NiT in 3 classes, 32 x 32 to 128 x 160 pixels" in source.report()[0]


def test_teachers_see_the_images_of_nit_as_its_data_set_shows_them(tmp_path: Path) -> None:
    """Resized at once to 16 pixels per latent, or ADM's centre crop of that size, mirrored with the latents."""
    write_nit(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (200, 330, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    file = tmp_path / "imagenet/train/n01/n01_1.JPEG"
    file.parent.mkdir(parents=True)
    picture.save(file, format="PNG")
    views = ImageViews("mixed", 256, 32, 4096)
    source = NiTLatents(tmp_path, views, None, "train", True, LatentSpec(32, 32), str(tmp_path / "imagenet"))
    assert isinstance(source, Rerendered)
    batches = MicroBatches(source, None, None, reread=(32, 16))
    native, square = (len(source.labels) // 3 * rule + 1 for rule in (0, 1))
    micro = MicroBatch(0, (0, 1), (native, square), 0, 0, 1.0, 2)
    images, _ = batches[micro]
    assert images.pictures is not None
    expected = [resize(picture, 32, 80, Image.Resampling.BICUBIC), center_crop(picture, 128)]
    for found, wanted in zip(images.pictures, expected, strict=True):
        assert torch.equal(found, torch.from_numpy(np.array(wanted)).permute(2, 0, 1))
    assert torch.equal(batches._moments(native, True)[1], images.pictures[0].flip(-1))
    with pytest.raises(ValueError, match=r"data\.image_root: .*n01_0\.JPEG cannot be read"):
        source.rendered(0, [(16, 16)])
    with pytest.raises(FileNotFoundError, match=r"data\.image_root=.*elsewhere is not a folder"):
        NiTLatents(tmp_path, views, None, "train", True, LatentSpec(32, 32), str(tmp_path / "elsewhere"))


def test_types_are_views_and_the_merged_file_counts_once(tmp_path: Path) -> None:
    write_nit(tmp_path)
    assert len(nit(tmp_path, "mixed").labels) == 15
    assert nit(tmp_path, "mixed").sizes[5:].tolist() == [[256, 256]] * 5 + [[512, 512]] * 5
    assert nit(tmp_path, "square", 512).sizes.tolist() == [[512, 512]] * 5
    with pytest.raises(ValueError, match=r"holds 256, 512, native, not what data\.view=square needs"):
        nit(tmp_path, "square", 128)
    with pytest.raises(ValueError, match=r"not what data\.view=flexible needs"):
        nit(tmp_path, "flexible")


def test_only_the_types_that_are_wanted_must_be_there(tmp_path: Path) -> None:
    write_nit(tmp_path)
    (tmp_path / "dc-ae-512x512").rename(tmp_path / "elsewhere")
    assert len(nit(tmp_path).labels) == 5
    with pytest.raises(FileNotFoundError, match=r"has no folder \*512x512 with latents of type fixed-512x512"):
        nit(tmp_path, "mixed")


def test_images_are_held_out_in_all_their_views(tmp_path: Path) -> None:
    write_nit(tmp_path)
    train, val = (nit(tmp_path, "mixed", holdout=2, split=split) for split in ("train", "val"))
    assert (len(train.labels), len(val.labels)) == (9, 6)
    assert train._files.tolist() == [name for name in nit(tmp_path, "mixed")._files.tolist() if "_1." not in name]
    assert set(val._files.tolist()) == {"n01/n01_1.safetensors", "n07/n07_1.safetensors"}
    assert held_out(np.array([0, 0, 1, 0, 1, 0]), 2).tolist() == [False, True, False, False, True, True]
    assert not held_out(np.zeros(4), None).any()


def test_appledouble_files_beside_nits_are_left_out(tmp_path: Path) -> None:
    write_nit(tmp_path)
    expected = nit(tmp_path).fingerprint
    meta = next((tmp_path / "data_meta").iterdir())
    for file in (meta.with_name(f"._{meta.name}"), tmp_path / f"._{meta.name}"):
        file.write_bytes(b"\0\5\26\7")
    (tmp_path / ".old-native-resolution").mkdir()
    assert nit(tmp_path).fingerprint == expected


def test_wrong_files_of_nit_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no data_meta/\*_meta\.jsonl of NiT"):
        nit(tmp_path)
    write_nit(tmp_path)
    source, file = nit(tmp_path), tmp_path / "dc-ae-native-resolution/n01/n01_1.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"n01_1\.safetensors is missing or damaged: "):
        source.moments(1, False)
    save_file({"latent": torch.zeros(2, 32, 3, 3), "label": torch.tensor(0.0)}, file)
    with pytest.raises(ValueError, match=r"n01_1\.safetensors holds \[3, 3\] latents, and its meta file says \[2, 5\]"):
        source.moments(1, False)
    with pytest.raises(ValueError, match=r"holds 32 channels, and the tokenizer has 4"):
        NiTLatents(tmp_path, ImageViews("native", 256, 32, 4096), None, "train", True, LatentSpec(4, 32))
    with pytest.raises(ValueError, match=r"holds images of 16 tokens; raise data\.max_image_tokens"):
        NiTLatents(tmp_path, ImageViews("native", 256, 32, 10), None, "train", True, LatentSpec(32, 32))
    with (tmp_path / "data_meta/dc-ae_merge_meta.jsonl").open("a") as meta:
        meta.write('{"latent_file": "x"}\n')
    with pytest.raises(ValueError, match=r"merge_meta\.jsonl: line 16 is not one of NiT's"):
        nit(tmp_path)


@pytest.mark.parametrize(
    ("label", "message"),
    [(-1.0, "holds the label -1.0, which is no number of a class below 1,000"),
     (float("nan"), "holds the label nan, which is no number of a class below 1,000"),
     (0.5, "holds the label 0.5"), (1e9, "holds the label 1000000000.0"), ([0.0, 1.0], "holds 2 labels, not one")],
)  # fmt: skip
def test_labels_of_nit_must_be_class_numbers(tmp_path: Path, label: Any, message: str) -> None:
    write_nit(tmp_path)
    file = tmp_path / "dc-ae-native-resolution/n07/n07_0.safetensors"
    save_file({"latent": torch.zeros(2, 32, 4, 4), "label": torch.tensor(label)}, file)
    with pytest.raises(ValueError, match=rf"n07_0\.safetensors {message}"):
        nit(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_latents_of_nit_must_be_finite(tmp_path: Path, value: float) -> None:
    write_nit(tmp_path)
    latent = torch.zeros(2, 32, 2, 5)
    latent[1, 3, 1, 1] = value
    save_file(
        {"latent": latent, "label": torch.tensor(0.0)}, tmp_path / "dc-ae-native-resolution/n01/n01_1.safetensors"
    )
    source = nit(tmp_path)
    assert not source.moments(1, False).any()
    with pytest.raises(ValueError, match=r"n01_1\.safetensors holds latents that are not finite; take the file from"):
        source.moments(1, True)


def write_lightningdit(root: Path, counts: tuple[int, ...] = (5, 3), channels: int = 4) -> tuple[Tensor, Tensor]:
    """Shards as LightningDiT's extraction leaves them; returns all latents and their mirror images."""
    generator = torch.Generator().manual_seed(1)
    root.mkdir(exist_ok=True)
    plain, flipped, first = [], [], 0
    for i, count in enumerate(counts):
        plain.append(2 * torch.randn(count, channels, 3, 3, generator=generator) + 0.5)
        flipped.append(torch.randn(count, channels, 3, 3, generator=generator))
        labels = torch.arange(first, first + count) % 3
        file = root / f"latents_rank{i:02d}_shard000.safetensors"
        save_file({"latents": plain[-1], "latents_flip": flipped[-1], "labels": labels}, file)
        first += count
    return torch.cat(plain), torch.cat(flipped)


def lightningdit(root: Path, size: int = 24, holdout: int | None = None, split: str = "train") -> LightningDiTLatents:
    return LightningDiTLatents(root, ImageViews("square", size, 8, 4096), holdout, split, True, LatentSpec(4, 8))


def test_lightningdits_shards_are_read_in_order(tmp_path: Path) -> None:
    plain, flipped = write_lightningdit(tmp_path)
    source = lightningdit(tmp_path)
    assert isinstance(source, LatentSource)
    assert source.labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert source.class_names == ["0", "1", "2"]
    assert source.sizes.tolist() == [[24, 24]] * 8
    for index in (0, 4, 5, 7):
        assert torch.equal(source.moments(index, False), plain[index])
        assert torch.equal(source.moments(index, True), flipped[index])
    val = lightningdit(tmp_path, holdout=2, split="val")
    assert val.labels.tolist() == [0, 1, 2]
    assert torch.equal(val.moments(2, False), plain[5])
    assert "8 latents of LightningDiT in 3 classes" in source.report()[0]


def test_appledouble_files_beside_lightningdits_shards_are_left_out(tmp_path: Path) -> None:
    write_lightningdit(tmp_path)
    shard = next(tmp_path.glob("*.safetensors"))
    shard.with_name(f"._{shard.name}").write_bytes(b"\0\5\26\7")
    assert len(lightningdit(tmp_path).labels) == 8


def test_wrong_shards_of_lightningdit_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no \*\.safetensors of LightningDiT"):
        lightningdit(tmp_path)
    write_lightningdit(tmp_path)
    with pytest.raises(ValueError, match=r"holds squares of 24 pixels; choose data\.view=square data\.size=24"):
        lightningdit(tmp_path, size=32)
    with pytest.raises(ValueError, match=r"holds 4 channels, and the tokenizer has 32"):
        LightningDiTLatents(tmp_path, ImageViews("square", 24, 8, 4096), None, "train", True, LatentSpec(32, 8))
    save_file({"labels": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"has a shard without latents; it is not LightningDiT's"):
        lightningdit(tmp_path)
    (tmp_path / "x.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"x\.safetensors is damaged"):
        lightningdit(tmp_path)


def test_latents_of_lightningdit_must_be_finite(tmp_path: Path) -> None:
    write_lightningdit(tmp_path)
    file = tmp_path / "latents_rank01_shard000.safetensors"
    shard = load_file(file)
    shard["latents"][2, 0, 1, 1] = float("nan")
    save_file(shard, file)
    source = lightningdit(tmp_path)
    source.moments(6, False)
    source.moments(7, True)
    with pytest.raises(ValueError, match=r"rank01_shard000\.safetensors holds latents that are not finite in row 2"):
        source.moments(7, False)
    with pytest.raises(ValueError, match=r"rank01_shard000\.safetensors holds latents that are not finite"):
        statistics(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(4)}, r"latents \[3, 4, 3, 3\], .* and labels \[4\], which do not agree"),
        ({"latents_flip": torch.zeros(2, 4, 3, 3)}, r"latents_flip \[2, 4, 3, 3\] .* which do not agree"),
        ({"labels": torch.zeros(3, 1)}, r"labels \[3, 1\], which do not agree"),
        ({"labels": torch.tensor([0, -2, 1])}, r"holds the label -2, which is no number of a class below 1,000"),
        ({"labels": torch.tensor([0, 1, 10**9])}, r"holds the label 1000000000, which is no number of a class"),
        ({"labels": torch.tensor([0, 1, 0.5])}, r"holds the label 0\.5, which is no number of a class"),
    ],
)
def test_a_shard_must_agree_with_itself(tmp_path: Path, change: dict[str, Tensor], message: str) -> None:
    write_lightningdit(tmp_path)
    file = tmp_path / "latents_rank01_shard000.safetensors"
    save_file({**load_file(file), **change}, file)
    with pytest.raises(ValueError, match=rf"latents_rank01_shard000\.safetensors .*{message}"):
        lightningdit(tmp_path)


def test_shards_are_read_however_little_comes_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, _ = write_lightningdit(tmp_path)
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda descriptor, count, begin: pread(descriptor, min(count, 7), begin))
    source = lightningdit(tmp_path)
    assert source.labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert torch.equal(source.moments(6, False), plain[6])
    assert torch.allclose(statistics(tmp_path)[0], plain.mean((0, 2, 3), keepdim=True), atol=1e-6)


def test_statistics_are_kept_in_memory_where_they_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the superuser, who may write everywhere, the refusal has to be made up."""
    plain, _ = write_lightningdit(tmp_path)
    monkeypatch.setattr(va_vae, "atomic_write", lambda *_: (_ for _ in ()).throw(PermissionError(13, "denied")))
    assert torch.allclose(statistics(tmp_path)[0], plain.mean((0, 2, 3), keepdim=True), atol=1e-6)
    assert not (tmp_path / STATISTICS).exists()


def test_damaged_statistics_are_named(tmp_path: Path) -> None:
    write_lightningdit(tmp_path)
    mean, std = statistics(tmp_path)
    file = tmp_path / STATISTICS
    whole = file.read_bytes()
    for data in (b"", whole[:100], whole[: len(whole) - 30], b"text"):
        file.write_bytes(data)
        with pytest.raises(ValueError, match=r"latents_stats\.pt is damaged; remove it, and it is made anew"):
            statistics(tmp_path)
    for other in ({"mean": mean}, {"mean": mean[0], "std": std}, {"mean": mean, "std": -std}, [mean]):
        torch.save(other, file)
        with pytest.raises(ValueError, match=r"latents_stats\.pt is damaged"):
            VAVAE(weights=str(tmp_path), stride=8, multiplier=1.0)
    file.unlink()
    assert torch.equal(statistics(tmp_path)[0], mean)
    assert sorted(file.suffix for file in tmp_path.iterdir()) == [".pt", ".safetensors", ".safetensors"]


def test_statistics_are_made_once_and_read_after(tmp_path: Path) -> None:
    plain, _ = write_lightningdit(tmp_path)
    mean, std = statistics(tmp_path)
    assert torch.allclose(mean, plain.mean((0, 2, 3), keepdim=True), atol=1e-6)
    assert torch.allclose(std, plain.std((0, 2, 3), keepdim=True), atol=1e-6)
    torch.save({"mean": mean + 1, "std": std}, tmp_path / STATISTICS)
    assert torch.equal(statistics(tmp_path)[0], mean + 1)


def test_statistics_of_many_latents_are_of_a_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, _ = write_lightningdit(tmp_path, (5, 4))
    assert va_vae.SAMPLED == 10_000
    monkeypatch.setattr(va_vae, "SAMPLED", 3)
    assert torch.allclose(statistics(tmp_path)[0], plain[::3].mean((0, 2, 3), keepdim=True), atol=1e-6)


def config(source: str, root: Path, *overrides: str) -> dict[str, Any]:
    shape = ["model=nit_tiny", "model.patch_size=1", "batch.packs=1", "data.max_tokens=300", "data.num_workers=0"]
    return composed(*shape, f"data={source}_latents", f"data.root={root}", *overrides)


def first(parts: build.RunComponents, index: int) -> Tensor:
    latents = parts.batches(parts.images, parts.assembly)[MicroBatch(0, (index,), (index,), 0, 0, 1.0, 0)][0]
    return parts.layout.to_latents(latents.x, latents)[0]


def test_a_run_trains_on_nits_latents_as_they_were_scaled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "tokenizer", lambda config: pytest.fail("weights were loaded"))
    stored = write_nit(tmp_path)
    parts = build.build_run(config("nit", tmp_path, "tokenizer=dc_ae"), 1)
    assert torch.allclose(first(parts, 1), stored["native-resolution", "n01/n01_1.safetensors"][0], rtol=1e-5)


def test_a_run_trains_on_lightningdits_latents(tmp_path: Path) -> None:
    plain, _ = write_lightningdit(tmp_path)
    square = ["data.size=24", "tokenizer=sd_vae", "tokenizer.weights=random_tiny"]
    parts = build.build_run(config("lightningdit", tmp_path, *square), 1)
    assert torch.allclose(first(parts, 6), plain[6] * 0.18215)
    codec = {"_target_": "genfound.data.latents.va_vae.VAVAE", "weights": str(tmp_path), "stride": 8, "multiplier": 0.5}
    parts = build.build_run({**config("lightningdit", tmp_path, *square), "tokenizer": codec}, 1)
    mean, std = statistics(tmp_path)
    assert torch.allclose(first(parts, 6), (plain[6] - mean[0]) / std[0] * 0.5, atol=1e-6)
    assert parts.tokenizer.decode(torch.zeros(1, 4, 3, 3)).shape == (1, 3, 24, 24)


def test_an_autoencoder_without_its_network_says_so(tmp_path: Path) -> None:
    write_lightningdit(tmp_path)
    codec = VAVAE(weights=str(tmp_path), stride=16, multiplier=1.0)
    assert codec.spec == (4, 16)
    for use in (codec.encode, codec.decode):
        with pytest.raises(ValueError, match="VA-VAE's network is no part of genfound"):
            use(torch.zeros(1, 4, 3, 3))


def write_repa(root: Path, labels: tuple[int, ...] = (3, 0, 3, 1), side: int = 4) -> list[np.ndarray]:
    """REPA's layout, mean and standard deviation; returns what is stored."""
    draw, names = np.random.default_rng(0), []
    stored = [np.concatenate([draw.normal(size=(4, side, side)), draw.random((4, side, side))]) for _ in labels]
    for number, array in enumerate(stored):
        names.append(f"{number // 2:05d}/img-mean-std-{number:08d}.npy")
        (root / "vae-sd" / names[-1]).parent.mkdir(parents=True, exist_ok=True)
        np.save(root / "vae-sd" / names[-1], array.astype(np.float32))
    pairs = [[name, label] for name, label in zip(names, labels, strict=True)]
    (root / "vae-sd/dataset.json").write_text(json.dumps({"labels": pairs[::-1]}))
    return stored


def repa(root: Path, size: int = 32, mirrored: bool = False, **options: Any) -> REPALatents:
    views = ImageViews("square", size, 16, 4096)
    return REPALatents(root, views, options.get("holdout"), options.get("split", "train"), mirrored, LatentSpec(4, 8))


def test_repas_files_are_means_and_deviations(tmp_path: Path) -> None:
    stored = write_repa(tmp_path)
    stored[1][4:] = 0
    np.save(tmp_path / "vae-sd/00000/img-mean-std-00000001.npy", stored[1])
    found = repa(tmp_path)
    assert found.labels.tolist() == [3, 0, 3, 1] and found.class_names == ["0", "1", "2", "3"]
    assert found.sizes.tolist() == [[32, 32]] * 4
    for index, want in enumerate(stored):
        mean, log_variance = found.moments(index, False).chunk(2)
        torch.testing.assert_close(mean, torch.tensor(want[:4]).float())
        torch.testing.assert_close((log_variance / 2).exp(), torch.tensor(want[4:]).float(), rtol=1e-5, atol=1e-6)
    assert repa(tmp_path / "vae-sd").fingerprint == found.fingerprint
    assert repa(tmp_path, holdout=2, split="val").labels.tolist() == [3]
    assert "4 latents of REPA in 4 classes" in found.report()[0]


def test_repas_latents_are_trained_on(tmp_path: Path) -> None:
    """Drawn and scaled as REPA does: (mean + std noise) 0.18215."""
    stored = write_repa(tmp_path)
    config = composed(
        "model=sit_tiny", "tokenizer=sd_vae", "tokenizer.weights=random_tiny", "data=repa_latents",
        f"data.root={tmp_path}", "data.size=32", "data.batch_size=2", "batch.images=4",
    )  # fmt: skip
    built = build.build_run(config, 1)
    batch = next(iter(built.loader(0)))[0]
    assert batch.x.shape == (2, 4, 4, 4) and len(built.images.class_names) == 4
    mean, deviation = torch.tensor(stored[2]).float().chunk(2)
    noise = torch.randn(1, 4, 4, 4)
    latents = built.tokenizer.normalise(built.images.moments(2, False)[None], noise)
    torch.testing.assert_close(latents, (mean + deviation * noise) * 0.18215)


def spoilt_repa(root: Path, what: str) -> None:
    labels, file = root / "vae-sd/dataset.json", root / "vae-sd/00000/img-mean-std-00000000.npy"
    array, pairs = np.load(file), json.loads(labels.read_text())["labels"]
    if what == "no labels":
        labels.write_text(json.dumps({"labels": None}))
    elif what == "folder":
        labels.unlink()
    elif what == "missing":
        file.unlink()
    elif what == "more":
        np.save(file.with_name("x.npy"), array)
    elif what == "label":
        labels.write_text(json.dumps({"labels": [[name, -1] for name, _ in pairs]}))
    elif what == "twice":
        labels.write_text(json.dumps({"labels": [*pairs, [pairs[0][0], 5]]}))
    elif what == "channels":
        np.save(file, array[:4])
    elif what == "cut":
        file.write_bytes(file.read_bytes()[:-8])
    elif what == "pickle":
        np.save(file, np.array([{}]), allow_pickle=True)
    elif what == "nan":
        np.save(file, array * np.nan)
    else:
        np.save(file, -abs(array))


SPOILT_REPA = {
    "no labels": 'dataset.json is damaged, or has no labels: it must hold {"labels"',
    "folder": "has no dataset.json beside folders of *.npy",
    "missing": "labels a file that is not there: 00000/img-mean-std-00000000.npy (1 in all)",
    "more": "has no label of 00000/x.npy (1 in all)",
    "twice": "dataset.json labels 1 files more than once",
    "label": "holds the label -1.0, which is no number of a class",
    "channels": "holds 4 channels, mean and deviation of 2, and the tokenizer has 4",
    "cut": "img-mean-std-00000000.npy is missing or damaged",
    "pickle": "img-mean-std-00000000.npy is missing or damaged",
    "nan": "img-mean-std-00000000.npy holds latents that are not finite",
    "negative": "its second half must be standard deviations",
}


@pytest.mark.parametrize("what", SPOILT_REPA)
def test_spoilt_files_of_repa_are_refused_in_a_line(what: str, tmp_path: Path) -> None:
    write_repa(tmp_path)
    spoilt_repa(tmp_path, what)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        repa(tmp_path).moments(0, False)
    assert SPOILT_REPA[what] in str(error.value) and "\n" not in str(error.value)


def test_repas_latents_have_one_size_and_no_mirror_images(tmp_path: Path) -> None:
    write_repa(tmp_path)
    with pytest.raises(ValueError, match=r"choose data.view=square data.size=32"):
        repa(tmp_path, size=256)
    with pytest.raises(ValueError, match=r"holds no mirror images; set data.flip=false"):
        repa(tmp_path, mirrored=True)
    other = np.ones((8, 8, 8), dtype=np.float32)
    np.save(tmp_path / "vae-sd/00001/img-mean-std-00000002.npy", other)
    with pytest.raises(ValueError, match="latents of another size"):
        repa(tmp_path).moments(2, False)
