"""Images encoded on the training device: in groups of one size, channels last, compiled, on CUDA beside the step."""

from __future__ import annotations

from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from genfound import build
from genfound.data.datamodule import GenerativeDataModule
from genfound.data.packing.collate import Collate, RawImages
from genfound.layouts import Packed
from genfound.rng import Rng
from genfound.tokenizers.autoencoder import Autoencoder
from genfound.training import fit
from tests.cli.commands import TINY
from tests.helpers import composed, run_dir

KINDS = ("sd_vae", "dc_ae", "vq_f4")
SIZES = [(64, 96), (32, 64), (64, 96), (96, 32), (64, 64), (32, 64), (64, 96)]
ONLINE = ("tokenizer=vq_f4", "tokenizer.weights=random_tiny", "data.sides=[16,24]", "data.num_workers=0")


def tokenizer(name: str) -> Autoencoder:
    built = build.tokenizer(composed(f"tokenizer={name}", "tokenizer.weights=random_tiny"))
    assert isinstance(built, Autoencoder)
    return built


def raw(sizes: list[tuple[int, int]]) -> RawImages:
    draw = torch.Generator().manual_seed(0)
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=draw) for size in sizes]
    return RawImages(images, torch.arange(len(sizes)), encoded=False)


def encoded(codec: Autoencoder, images: RawImages, positions: list[int]) -> list[Tensor]:
    layout = Packed(1, 4096, 16)
    batch = Collate(codec, layout, Rng(0, "encode"))(images, positions, torch.device("cpu"))
    return layout.to_latents(batch.x, batch)


def online(*overrides: str) -> GenerativeDataModule:
    return GenerativeDataModule(build.build_run(composed(*TINY, *ONLINE, *overrides), 1, with_values=False))


@pytest.mark.parametrize("name", KINDS)
def test_images_of_one_size_are_encoded_together_as_they_are_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    codec, images = tokenizer(name), raw(SIZES)
    places = range(len(SIZES))
    alone = [encoded(codec, RawImages([images.images[k]], images.labels[k : k + 1], False), [k])[0] for k in places]
    seen: list[Tensor] = []
    encode = codec.model.encode
    monkeypatch.setattr(codec.model, "encode", lambda x: (seen.append(x), encode(x))[1])
    together = encoded(codec, images, [*places])
    assert sorted(tuple(x.shape[-2:]) for x in seen) == sorted(set(SIZES))
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * float(other.abs().max()))


@pytest.mark.parametrize("name", KINDS)
def test_channels_are_last_inside_of_a_tokenizer_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    codec, last = tokenizer(name), torch.channels_last
    assert all(p.is_contiguous(memory_format=last) for p in codec.model.parameters() if p.ndim == 4)
    seen: list[Tensor] = []
    encode, decode = codec.model.encode, codec.model.decode
    monkeypatch.setattr(codec.model, "encode", lambda x: (seen.append(x), encode(x))[1])
    monkeypatch.setattr(codec.model, "decode", lambda x: (seen.append(x), decode(x))[1])
    latents = codec.encode(torch.rand(2, 3, 64, 96))
    images = codec.decode(latents)
    assert [x.is_contiguous(memory_format=last) for x in seen] == [True, True]
    assert latents.is_contiguous() and images.is_contiguous()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", KINDS)
def test_a_compiled_encoder_is_compiled_few_times_and_equal(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counted, codec = CompileCounter(), tokenizer(name)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counted))
    one, any_size = codec.compiled(dynamic=False), codec.compiled(dynamic=True)
    square, mixed = raw([(64, 64)] * 3), raw(SIZES)
    for compiled, images, most in ((one, square, 1), (any_size, mixed, 4)):
        before, count = counted.frame_count, len(images.images)
        for positions in ([*range(count)], [*range(7, 7 + count)]):
            found, expected = (encoded(codec, images, positions) for codec in (compiled, codec))
            for latent, other in zip(found, expected, strict=True):
                torch.testing.assert_close(latent, other, rtol=0, atol=1e-6)
        assert 1 <= counted.frame_count - before <= most


def test_the_encoder_of_training_is_compiled_where_blocks_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr("genfound.backbones.base.Backbone.compile_blocks", lambda self: None)
    monkeypatch.setattr(Autoencoder, "compiled", lambda self, dynamic: (asked.append(dynamic), self)[1])
    options = [*TINY, *ONLINE, "trainer.max_steps=1"]
    for number, compiled in enumerate(("false", "true", "true")):
        sides = ["data.sides=[16]"] if number == 2 else []
        fit(run_dir(tmp_path / str(number), *options, f"compile={compiled}", *sides))
    assert asked == [True, False]  # for images of several sizes, and of one


def test_held_out_images_do_not_wait_for_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Autoencoder, "compiled", lambda self, dynamic: "compiled")
    data = online()
    data.compile_tokenizer()
    assert data.collate.tokenizer == "compiled" and data.val_collate.tokenizer is data.parts.tokenizer


@pytest.mark.gpu
def test_encoding_beside_the_step_changes_nothing() -> None:
    data, device = online(), torch.device("cuda")
    data.trainer: Any = SimpleNamespace(training=True)
    begin = torch.rand(4096, 4096, device=device)
    for images, micro in islice(data.train, 5):
        busy = begin @ begin @ begin
        batch, _ = data.transfer_batch_to_device((images, micro), device, 0)
        expected = data.collate(images, micro.positions, device)
        assert torch.equal(batch.x, expected.x) and torch.equal(batch.y, expected.y) and busy.isfinite().all()
    assert data._beside is not None and data.encoding.take() > 0
