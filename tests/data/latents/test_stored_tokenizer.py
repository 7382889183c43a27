from __future__ import annotations

import functools
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from genfound import build
from genfound.data.latents.manifest import read_manifest, write_manifest
from genfound.data.latents.stored_tokenizer import (
    StoredTokenizer,
    TokenizerInfo,
    describe,
    encoder_digest,
    stored_tokenizer,
)
from genfound.data.packing.batch_plan import MicroBatch
from genfound.tokenizers import PixelTokenizer
from genfound.tokenizers.weights import CONFIG, WEIGHTS
from genfound.training import fit
from tests.helpers import composed, run_dir
from tests.stores import encoded, tree

KL = ["tokenizer=sd_vae", "tokenizer.weights=random_tiny", "patch_size=1"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("latents")
    return encoded(tree(root / "images"), root / "store", *KL, "data.holdout=3", "dtype=fp32")


def config(store: Path, *overrides: str) -> dict[str, Any]:
    source = [
        "data=latent_store",
        f"data.root={store}",
        "data.holdout=3",
        "data.max_tokens=256",
    ]
    model = ["model=nit_tiny", "model.patch_size=1", "batch.packs=1", "tokenizer=sd_vae", "data.num_workers=0"]
    return composed(*model, *source, "tokenizer.weights=random_tiny", *overrides)


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "tokenizer", lambda config: pytest.fail("weights were loaded"))


def first(parts: build.RunComponents, *indices: int, position: int = 0) -> torch.Tensor:
    micro = MicroBatch(0, tuple(range(position, position + len(indices))), indices, 0, 0, 1.0, 0)
    return parts.batches(parts.images, parts.assembly)[micro][0].x


@pytest.mark.usefixtures("no_weights")
def test_a_run_reads_a_store_without_the_weights(store: Path) -> None:
    parts = build.build_run(config(store), 1)
    assert parts.tokenizer.spec == (4, 8)
    assert len(parts.images.class_names) == parts.net.null_label == 3
    assert (len(parts.images.labels), len(parts.held_out.labels)) == (12, 6)
    assert any("encoded by sd_vae" in line for line in parts.report())
    batch, _ = next(iter(parts.loader(0)))
    assert int(batch.real.sum()) > 1 and batch.x.dtype == torch.float32


@pytest.mark.usefixtures("no_weights")
def test_latents_are_drawn_from_the_posterior_with_each_images_own_noise(store: Path) -> None:
    parts, mode = (build.build_run(config(store, f"tokenizer.posterior={rule}"), 1) for rule in ("sample", "mode"))
    assert parts.tokenizer.stochastic and not mode.tokenizer.stochastic
    mean, logvar = parts.images.moments(5, False).chunk(2)
    count = mean[0].numel()
    assert torch.allclose(first(mode, 5)[:count], (mean * 0.18215).flatten(1).T, rtol=0, atol=1e-6)
    drawn = first(parts, 5, position=7)
    assert torch.equal(first(parts, 5, position=7), drawn)
    assert not torch.equal(first(parts, 5, position=8), drawn)
    noise = parts.assembly.rng.at(7).normal("posterior", mean.shape)
    expected = (mean + (0.5 * logvar).exp() * noise) * 0.18215
    assert torch.allclose(drawn[:count], expected.flatten(1).T, rtol=0, atol=1e-6)


def test_training_from_a_store_is_training_from_its_images(store: Path) -> None:
    stored = build.build_run(config(store), 1)
    images = ["data=imagenet_native", f"data.root={store.parent}/images", f"runs={store.parent}/runs"]
    direct = build.build_run(config(store, *images), 1)
    for (a, m), (b, n), _ in zip(stored.loader(0), direct.loader(0), range(3), strict=False):
        assert m == n
        batch = direct.assembly(b, n.positions, torch.device("cpu"))
        assert torch.equal(a.y, batch.y)
        assert torch.allclose(a.x, batch.x, rtol=0, atol=1e-4)


def test_only_decoding_loads_the_weights_and_workers_do_not_get_them(store: Path) -> None:
    codec = build.build_run(config(store), 1).tokenizer
    assert "_tokenizer" not in vars(codec)
    decoded = codec.decode(torch.zeros(1, 4, 2, 3))
    assert decoded.shape == (1, 3, 16, 24)
    assert "_tokenizer" in vars(codec)
    assert "_tokenizer" not in vars(pickle.loads(pickle.dumps(codec)))


def test_without_weights_pictures_show_channels_of_the_latents(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent(*_: object) -> None:
        raise FileNotFoundError("tokenizer.weights=x is nowhere")

    monkeypatch.setattr(build, "tokenizer", absent)
    codec = build.build_run(config(store), 1).tokenizer
    latent = torch.randn(1, 4, 2, 3)
    for _ in range(2):
        picture = codec.decode(latent)
        assert picture.shape == (1, 3, 16, 24)
        assert torch.equal(picture[..., ::8, ::8], latent[:, :3] / 2)
    assert capsys.readouterr().out.count("warning: pictures show channels of the latents, which cannot be decoded") == 1


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["tokenizer=vq_f4"],
            r"was encoded by sd_vae random_tiny \(scale 0\.18215\), and the tokenizer is vq_f4 random_tiny",
        ),
        (
            ["tokenizer.weights=random"],
            r"the tokenizer is sd_vae random \(scale 0\.18215\); choose that one, or encode again",
        ),
        (["model.patch_size=2"], r"do not divide into tokens of 16 pixels; encode with patch_size=2"),
        (["model.channels=16"], r"tokenizer is sd_vae \(4 channels\) but model\.channels is 16"),
        (["model=dit_tiny", "data.view=null", "batch.images=32"], r"holds native, and data\.view=square needs 256"),
        (["data.holdout=0"], r"data\.holdout=0 must be a whole number of at least 2, or null"),
    ],
    ids=["class", "weights", "patch", "channels", "view", "holdout"],
)
def test_what_does_not_fit_is_refused(store: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build.build_run(config(store, *overrides), 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a tiny autoencoder as a folder of diffusers."""
    folder = tmp_path_factory.mktemp("weights")
    codec = build.tokenizer(composed("tokenizer=sd_vae", "tokenizer.weights=random_tiny"))
    codec.model.save_pretrained(folder)
    return folder


def options(folder: Path | str) -> dict[str, Any]:
    return dict(composed("tokenizer=sd_vae", f"tokenizer.weights={folder}")["tokenizer"])


def described(folder: Path | str) -> TokenizerInfo:
    return describe(options(folder), lambda: pytest.fail("weights were loaded"))


@pytest.mark.parametrize("name", ["sd_vae", "dc_ae", "vq_f4"])
def test_a_description_is_what_the_tokenizer_says(name: str) -> None:
    asked = composed(f"tokenizer={name}", "tokenizer.weights=random_tiny")
    found, codec = describe(asked["tokenizer"], lambda: pytest.fail("loaded")), build.tokenizer(asked)
    assert (found.spec, found.scale, found.shift, found.stochastic) == (
        codec.spec, codec.scale, codec.shift, codec.stochastic,
    )  # fmt: skip


def changed(folder: Path, target: Path, key: str | None = None, **config: object) -> Path:
    """A copy of the weights with one tensor, or some of the config, changed."""
    target.mkdir()
    tensors = load_file(folder / WEIGHTS)
    if key is not None:
        tensors[key] = tensors[key] + 1
    save_file(tensors, target / WEIGHTS)
    (target / CONFIG).write_text(json.dumps({**json.loads((folder / CONFIG).read_text()), **config}))
    return target


def test_the_digest_is_that_of_the_encoder(folder: Path, tmp_path: Path) -> None:
    digest = encoder_digest(described(folder))
    decoder = changed(folder, tmp_path / "decoder", "decoder.conv_in.bias")
    encoder = changed(folder, tmp_path / "encoder", "encoder.conv_in.bias")
    assert encoder_digest(described(decoder)) == digest != encoder_digest(described(encoder))
    assert encoder_digest(described("random_tiny")) == "random_tiny"
    assert encoder_digest(describe({"_target_": "genfound.tokenizers.pixel.PixelTokenizer"}, PixelTokenizer)) == ""


@pytest.fixture(scope="module")
def from_folder(store: Path, folder: Path) -> Iterator[Path]:
    yield encoded(store.parent / "images", store.parent / "folder", *KL, f"tokenizer.weights={folder}")


def opened(store: Path, weights: Path | str) -> StoredTokenizer:
    asked = options(weights)
    load = functools.partial(build.tokenizer, {"tokenizer": asked})
    return stored_tokenizer({"_target_": "genfound.data.latents.store.Store", "root": str(store)}, asked, load)


def test_a_store_belongs_to_an_encoder_not_to_a_path(from_folder: Path, folder: Path, tmp_path: Path) -> None:
    assert opened(from_folder, changed(folder, tmp_path / "same")).spec == (4, 8)
    assert opened(from_folder, changed(folder, tmp_path / "decoder", "decoder.conv_in.bias")).spec == (4, 8)
    other = changed(folder, tmp_path / "encoder", "encoder.conv_in.bias")
    scaled = changed(folder, tmp_path / "scaled", scaling_factor=0.5)
    for weights in (other, scaled, "random_tiny", "some/where"):
        with pytest.raises(ValueError, match=r"was encoded by sd_vae .*; choose that one, or encode again"):
            opened(from_folder, weights)


@pytest.mark.parametrize("name", ["SdVae", "SDVAE"])
def test_a_store_may_name_the_class_of_its_tokenizer(
    name: str, from_folder: Path, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "store").mkdir()
    manifest = read_manifest(from_folder)
    write_manifest(tmp_path / "store", {**manifest, "tokenizer": {**manifest["tokenizer"], "name": name}})
    assert opened(tmp_path / "store", folder).spec == (4, 8)


def test_weights_that_are_gone_are_known_by_their_name(from_folder: Path, folder: Path) -> None:
    moved = folder.rename(folder.with_name("moved"))
    try:
        codec = opened(from_folder, folder)
        assert (codec.described.scale, codec.spec) == (0.18215, (4, 8))
    finally:
        moved.rename(folder)


def losses(folder: Path) -> list[float]:
    lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    return [line["train/loss"] for line in lines if "train/loss" in line]


def test_a_run_from_a_store_resumes_exactly(store: Path, tmp_path: Path) -> None:
    other = encoded(store.parent / "images", tmp_path / "other", *KL, "data.holdout=3", "dtype=bf16")
    data = ["data=latent_store", "data.holdout=3", "data.max_tokens=200"]
    model = [
        "model=nit_tiny",
        "model.patch_size=1",
        "model.width=32",
        "model.depth=1",
        "model.heads=1",
        "batch.packs=2",
    ]
    short = [
        "logger=jsonl",
        "trainer.log_every_n_steps=1",
        "callbacks.validation.every=30",
        "budget.images=100000",
        "callbacks.validation.images=6",
    ]
    codec = ["tokenizer=sd_vae", "tokenizer.weights=random_tiny", "data.num_workers=0", "data.flip=true"]
    choice = [*data, *model, *short, *codec, "callbacks.preview.every=1000000"]
    fit(run_dir(tmp_path / "straight", *choice, f"data.root={store}", "trainer.max_steps=6"))
    for steps in (3, 6):
        fit(run_dir(tmp_path / "resumed", *choice, f"data.root={store}", f"trainer.max_steps={steps}"))
    assert len(losses(tmp_path / "straight")) == 6
    assert losses(tmp_path / "resumed") == losses(tmp_path / "straight")
    with pytest.raises(ValueError, match=r"these are not the images that .* was trained on"):
        fit(run_dir(tmp_path / "resumed", *choice, f"data.root={other}", "trainer.max_steps=7"))
