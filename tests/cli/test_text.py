"""Models of text from the command line: captions, prompts, and what does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

import genfound as library
from genfound.data.images.shapes import Shapes
from genfound.metrics.clip_score import ClipScore
from tests.cli.commands import TINY, genfound, one_error
from tests.text.test_encoders import gemma

TEXT = [*TINY, "model=nit_t2i_tiny", "data.max_tokens=256"]
CAPTIONS = ["data=captions", "data.root=pictures", "data.num_workers=0", "data.holdout=4"]
CLASSES = [*TINY, "model=nit_tiny"]


def captioned(root: Path, count: int = 24) -> None:
    """Drawn shapes, half of them in a folder of their own, with captions beside them."""
    source = Shapes(
        images=count, holdout=0, sides=[12, 16], view="native", size=16, max_tokens=64, unit=2, split="train", seed=0
    )
    for number in range(count):
        file = root / ("more" if number % 2 else "") / f"{number:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(source.image(number)).save(file)
        file.with_suffix(".txt").write_text(f"{source.caption(number)}\n")


def test_a_folder_with_captions_trains_previews_and_draws_what_it_is_told(tmp_path: Path) -> None:
    captioned(tmp_path / "pictures")
    often = ["callbacks.validation.every=20", "trainer.max_steps=8", "name=run"]
    result = genfound("train", *TEXT, *CAPTIONS, *often, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "24 images with captions" in result.stdout and "ignored" not in result.stdout
    run = tmp_path / "runs/default/run"
    assert any((run / "samples").glob("images-*.png"))
    losses = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any("val/loss" in line for line in losses)
    asked = ["from=runs/default/run", 'prompts=["a red circle","a blue: square"]', "size=[12,16]", "n=2", "out=out"]
    drawn = genfound("sample", *asked, cwd=tmp_path)
    assert drawn.returncode == 0, drawn.stderr
    names = sorted(file.name for file in (tmp_path / "out").glob("0*.png"))
    assert names[:2] == ["00000_a_red_circle_12x16.png", "00001_a_blue_square_12x16.png"] and len(names) == 4
    model = library.load(run)
    alone = library.sample(model, prompts="a blue: square", size=(12, 16), n=2, seed=0)
    together = library.sample(model, prompts=["a red circle", "a blue: square"], size=(12, 16))
    assert alone.shape == (2, 12, 16, 3) and together.shape == (2, 12, 16, 3)
    for labels, error in (
        (["labels=[0]"], "labels: this model reads captions; give prompts=[...]"),
        ([], "prompts=[]:"),
    ):
        assert error in one_error(genfound("sample", "from=runs/default/run", *labels, cwd=tmp_path))
    moved = one_error(
        genfound("sample", "from=runs/default/run", "text_encoder.weights=here", "prompts=[a]", cwd=tmp_path)
    )
    assert "text_encoder.weights=here: text_encoder=bytes has none" in moved


def test_a_gemma_of_local_weights_is_the_encoder(tmp_path: Path) -> None:
    gemma(tmp_path / "gemma")
    encoder = ["text_encoder=gemma3_1b", "text_encoder.weights=gemma", "text_encoder.width=24", "text_encoder.tokens=8"]
    result = genfound("train", *TEXT, *encoder, "trainer.max_steps=2", "name=run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (tmp_path / "gemma").rename(tmp_path / "moved")
    drawn = ["from=runs/default/run", "prompts=[a red circle]", "text_encoder.weights=moved", "out=out"]
    assert genfound("sample", *drawn, cwd=tmp_path).returncode == 0
    error = one_error(genfound("sample", *drawn[:2], cwd=tmp_path))
    assert "text_encoder.weights=" in error and "is not a folder" in error


def test_the_weights_of_an_encoder_are_fetched(tmp_path: Path) -> None:
    gemma(tmp_path / "gemma")
    words = ["text_encoder=gemma3_1b", "text_encoder.weights=gemma", "text_encoder.width=24", "inception=false"]
    fetched = genfound("fetch", "model=nit_t2i_tiny", *words, "to=weights", cwd=tmp_path)
    assert fetched.returncode == 0, fetched.stderr
    assert f"set text_encoder.weights={tmp_path / 'weights/gemma'}" in fetched.stdout
    kept = {file.name for file in (tmp_path / "weights/gemma").iterdir()}
    assert kept == {"config.json", "model.safetensors", "tokenizer.json"}
    error = one_error(genfound("fetch", *words, "text_encoder.width=32", cwd=tmp_path))
    assert "text_encoder.width=32, but gemma has 24; set it so" in error


def losses(run: Path) -> list[float]:
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return [line["train/loss"] for line in lines if "train/loss" in line]


ENCODE = [*CAPTIONS, "data.flip=false", "tokenizer=pixel", "patch_size=2", "features_dtype=fp32", "dtype=fp32"]
STORED = ["data=latent_store", "data.flip=false", "data.num_workers=0", "name=stored", "trainer.max_steps=3"]


def test_a_store_holds_the_text_and_trains_as_the_images_do(tmp_path: Path) -> None:
    captioned(tmp_path / "pictures")
    for extra, folder in (([], "one"), (["shard_images=5"], "small")):
        words = [*ENCODE, "text_encoder=bytes", f"out={folder}", *extra]
        encoded = genfound("encode", *words, cwd=tmp_path)
        assert encoded.returncode == 0, encoded.stderr
    manifest = json.loads((tmp_path / "one/manifest.json").read_text())
    assert manifest["text"]["encoder"]["width"] == 64 and manifest["text"]["dtype"] == "fp32"
    kept = [*TEXT, *STORED, "data.root=one", "callbacks.preview=null"]
    trained = genfound("train", *kept, cwd=tmp_path)
    assert trained.returncode == 0 and "captions, 64 values of each token" in trained.stdout, trained.stderr
    straight = [*CAPTIONS, "data.num_workers=0", "trainer.max_steps=3", "name=straight"]
    assert genfound("train", *TEXT, *straight, cwd=tmp_path).returncode == 0
    runs = tmp_path / "runs/default"
    assert losses(runs / "stored") == pytest.approx(losses(runs / "straight"), rel=1e-5)
    preview = [*TEXT, *STORED[:-1], "data.root=small", "name=small", "trainer.max_steps=16"]
    assert genfound("train", *preview, cwd=tmp_path).returncode == 0
    assert any((runs / "small/samples").glob("images-*.png"))


def test_a_store_of_other_text_is_named(tmp_path: Path) -> None:
    captioned(tmp_path / "pictures")
    captioned(tmp_path / "folders/one")
    assert genfound("encode", *ENCODE, "text_encoder=bytes", "out=store", cwd=tmp_path).returncode == 0
    classes = ["data=image_folder", "data.root=folders", "tokenizer=pixel", "patch_size=2", "data.flip=false"]
    assert genfound("encode", *classes, "out=plain", cwd=tmp_path).returncode == 0
    wrong = {
        ("train", *TEXT, *STORED, "data.root=plain"): "data.root=plain holds no captions; give genfound.encode this",
        ("train", *TEXT, *STORED, "data.root=store", "text_encoder.context=4"): (
            "text_encoder: data.root=store holds the text of another one (context=8); give genfound.encode"
        ),
        ("train", *CLASSES, *STORED, "data.root=store"): "data have captions and no classes; choose a model of text",
        ("encode", *ENCODE, "out=next"): "data have captions and no classes; choose a model of text, such as",
        ("encode", *classes, "text_encoder=bytes", "out=next"): "data have no captions, which this model reads; choose",
        ("encode", *ENCODE, "text_encoder=bytes", "text_encoder.width=32", "out=store"): "text.encoder.width: 64 there",
    }  # fmt: skip
    for words, message in wrong.items():
        assert message in one_error(genfound(*words, cwd=tmp_path)), words
    file = next((tmp_path / "store").glob("train-*.safetensors"))
    content = bytearray(file.read_bytes())
    span = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["values/text"]["data_offsets"]
    content[8 + int.from_bytes(content[:8], "little") + span[0]] ^= 1
    file.write_bytes(content)
    error = one_error(genfound("train", *TEXT, *STORED, "data.root=store", "trainer.max_steps=8", cwd=tmp_path))
    assert "features of text has not the checksum" in error


def spoilt(root: Path, name: str, content: bytes | None) -> None:
    captioned(root)
    file = root / name
    file.unlink() if content is None else file.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("000.txt", None, "data.root: pictures/000.png has no caption; write 000.txt beside it"),
        ("more/001.txt", b" \n", "data.root: pictures/more/001.txt is empty; write the caption into it, or remove it"),
        ("002.txt", b"\xff\xfe", "data.root: pictures/002.txt is not UTF-8"),
    ],
)
def test_a_caption_that_is_missing_or_wrong_is_named(
    name: str, content: bytes | None, message: str, tmp_path: Path
) -> None:
    spoilt(tmp_path / "pictures", name, content)
    assert message in one_error(genfound("train", *TEXT, *CAPTIONS, cwd=tmp_path))


UNFIT = {
    "classes of captions": ([*CLASSES, *CAPTIONS], "data have captions and no classes; choose a model of text"),
    "captions of classes": (
        [*TEXT, "data=image_folder", "data.root=folders"],
        "data have no captions, which this model reads; choose data=captions, a store of genfound.encode",
    ),
    "no encoder": ([*TEXT, "text_encoder=none"], "text_encoder=none, but NiTT2I reads captions; choose text_encoder="),
    "an encoder for nothing": (
        [*CLASSES, "text_encoder=bytes"],
        "text_encoder: NiT reads no captions; set text_encoder=",
    ),
    "no weights": (
        [*TEXT, "text_encoder=gemma3_1b", "text_encoder.weights=nowhere"],
        "text_encoder.weights=nowhere is not",
    ),
    "no length": ([*TEXT, "text_encoder.tokens=0"], "text_encoder.tokens=0 must be a whole number of at least 1"),
    "no context": ([*TEXT, "text_encoder.context=0"], "text_encoder.context=0 must be a whole number of at least 1"),
    "no folder": ([*TEXT, "data=captions", "data.root=none"], "data.root=none is not a folder"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_what_does_not_fit_is_one_line(case: str, tmp_path: Path) -> None:
    captioned(tmp_path / "pictures")
    captioned(tmp_path / "folders/one")
    arguments, message = UNFIT[case]
    assert message in one_error(genfound("train", *arguments, "name=run", cwd=tmp_path))


def test_prompts_are_nothing_to_a_model_of_classes(tmp_path: Path) -> None:
    assert genfound("train", *CLASSES, "trainer.max_steps=1", "name=run", cwd=tmp_path).returncode == 0
    for extra, message in (
        ("prompts=[a red circle]", "prompts: this model knows classes and no text; give labels=[...]"),
        (
            "text_encoder.weights=here",
            "text_encoder.weights=here: runs/default/run is a model of classes, which reads no",
        ),
    ):
        assert message in one_error(genfound("sample", "from=runs/default/run", extra, cwd=tmp_path))


def clip(folder: Path) -> Path:
    """A small CLIP of random weights as the hub has them, that knows letters."""
    torch.manual_seed(0)
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    names = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**small, "vocab_size": len(names), "bos_token_id": 0, "eos_token_id": 1}
    vision = {**small, "image_size": 32, "patch_size": 16}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    CLIPTokenizer(vocab={name: number for number, name in enumerate(names)}, merges=[]).save_pretrained(folder)
    return folder


def test_a_clip_score_is_the_mean_cosine_of_images_and_their_prompts(tmp_path: Path) -> None:
    measure = ClipScore(str(clip(tmp_path / "clip")), torch.device("cpu"))
    draw = np.random.default_rng(0)
    images = [draw.integers(0, 256, (20, 24, 3), dtype=np.uint8) for _ in range(70)]
    prompts = ["a red circle", "a blue square " * 30] * 35
    pairs = zip(images, prompts, strict=True)
    apart = [measure([image], [prompt]) for image, prompt in pairs]  # type: ignore[arg-type]
    assert measure(images, prompts) == pytest.approx(np.mean(apart), abs=1e-6)  # type: ignore[arg-type]
    words = measure.processor(text=prompts[:1], images=[Image.fromarray(images[0])], return_tensors="pt")
    out = measure.model(**words)
    expected = torch.cosine_similarity(out.image_embeds, out.text_embeds).item()
    assert apart[0] == pytest.approx(expected, abs=1e-5) and len(set(apart)) == 70


def test_samples_of_captions_are_measured_with_their_prompts(tmp_path: Path) -> None:
    clip(tmp_path / "clip")
    trained = genfound(
        "train", *TEXT, "data.images=200", "data.holdout=100", "trainer.max_steps=1", "name=run", cwd=tmp_path
    )
    assert trained.returncode == 0, trained.stderr
    asked = ["from=runs/default/run", "protocol=quick", "n=96", "reference_images=100"]
    measured = genfound("evaluate", *asked, "clip_weights=clip", cwd=tmp_path)
    assert measured.returncode == 0, measured.stderr
    (line,) = (tmp_path / "runs/default/run/evaluations/results.jsonl").read_text().splitlines()
    result = json.loads(line)
    assert abs(result["figures"]["clip_score"]) < 1 and "fd_probe" in result["figures"]
    assert len(result["protocol"]["extractor"]["clip"]) == 16
    wrong = {
        "labels=random": "labels=random: this model reads captions, which are those of its data; set labels=data",
        "clip_weights=nowhere": "preprocessor_config.json, or a name on the Hugging Face hub",
    }
    for word, message in wrong.items():
        assert message in one_error(genfound("evaluate", *asked, word, cwd=tmp_path))
    (tmp_path / "clip/tokenizer.json").write_text("{")
    assert "clip is damaged" in one_error(genfound("evaluate", *asked, "clip_weights=clip", cwd=tmp_path))
    captioned(tmp_path / "pictures")
    classes = [*CLASSES, "data.images=200", "data.holdout=100", "trainer.max_steps=1", "name=classes"]
    assert genfound("train", *classes, cwd=tmp_path).returncode == 0
    clip(tmp_path / "clip")
    for origin, message in (
        ("from=runs/default/classes", "clip_weights: this model knows classes and no text"),
        ("from=pictures", "clip_weights: images alone have no prompts"),
    ):
        words = [origin, *asked[1:], "clip_weights=clip"]
        assert message in one_error(genfound("evaluate", *words, cwd=tmp_path))
