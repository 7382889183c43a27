"""Text encoders: what they make of captions, and weights that are wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from genfound.text import TextEncoder, from_config
from genfound.text.byte_features import ByteFeatures
from genfound.text.gemma import Gemma3
from tests.helpers import composed

CPU = torch.device("cpu")
WORDS = ["<pad>", "<bos>", "a", "red", "blue", "circle", "square"]


def gemma(folder: Path, width: int = 24) -> Path:
    """A small Gemma 3 of random weights as the hub has them, that knows a few words."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=len(WORDS), hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, sliding_window=4,
    )  # fmt: skip
    Gemma3ForCausalLM(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, "<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def encoder(folder: Path, **options: Any) -> Gemma3:
    return Gemma3(**{"weights": str(folder), "width": 24, "tokens": 8, "layer": -1, "precision": "fp32", **options})


def test_bytes_tell_of_what_came_before_them_alone() -> None:
    encode = ByteFeatures(width=16, tokens=10, context=3, weights=None)
    one, two, again, long = encode(["a red", "a bed", "a red", "a red circle"], CPU)
    assert one.shape == (5, 16) and torch.equal(one, again)
    assert torch.equal(one[:2], two[:2]) and not torch.equal(one[2:], two[2:])
    assert long.shape == (10, 16) and torch.equal(long[:5], one)
    (far,) = encode(["bed of red"], CPU)
    torch.testing.assert_close(far[-1], encode(["a red"], CPU)[0][-1])  # of the last three bytes
    assert ByteFeatures(width=16, tokens=10, context=4, weights=None)(["a red"], CPU)[0].ne(one).any()


def test_gemma_gives_the_last_hidden_state_of_each_caption(tmp_path: Path) -> None:
    encode = encoder(gemma(tmp_path))
    together = encode(["a red circle", "blue"], CPU)
    assert [tuple(own.shape) for own in together] == [(4, 24), (2, 24)]  # each with its first token
    for caption, own in zip(["a red circle", "blue"], together, strict=True):
        torch.testing.assert_close(encode([caption], CPU)[0], own)
    model = Gemma3ForCausalLM.from_pretrained(tmp_path).model
    ids = torch.tensor([[1, 2, 3, 5]])
    found = model(ids, output_hidden_states=True)
    torch.testing.assert_close(together[0], found.last_hidden_state[0])
    (lower,) = encoder(tmp_path, layer=-2)(["a red circle"], CPU)
    torch.testing.assert_close(lower, found.hidden_states[-2][0])
    assert encoder(tmp_path, tokens=3)(["a red circle"], CPU)[0].shape == (3, 24)
    half = encoder(tmp_path, precision="bf16")(["a red circle"], CPU)[0]
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), together[0], atol=0.1, rtol=0.1)


def test_what_is_wrong_with_weights_is_one_line(tmp_path: Path) -> None:
    folder = gemma(tmp_path / "whole")
    for options, message in (
        ({"width": 32}, r"^text_encoder.width=32, but .*whole has 24; set it so$"),
        ({"layer": -4}, r"^text_encoder.layer=-4 must be from -3 to -1$"),
        ({"precision": "fp8"}, r"^text_encoder.precision=fp8 is unknown; choose one of bf16, fp32$"),
        ({"tokens": 0}, r"^text_encoder.tokens=0 must be a whole number of at least 1$"),
    ):
        with pytest.raises(ValueError, match=message):
            encoder(folder, **options)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer.json is damaged: "):
        encoder(folder)
    gemma(tmp_path / "other")
    (tmp_path / "other/model.safetensors").write_bytes(b"none")
    with pytest.raises(ValueError, match=r"other is damaged: "):
        encoder(tmp_path / "other")
    config = json.loads((gemma(tmp_path / "third") / "config.json").read_text())
    more = {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}
    (tmp_path / "third/config.json").write_text(json.dumps({**config, **more}))
    with pytest.raises(ValueError, match=r"the weights in .*third are of another network: \d+ names differ"):
        encoder(tmp_path / "third")
    (tmp_path / "third/tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"^text_encoder.weights=.*: there is no tokenizer.json in this folder"):
        encoder(tmp_path / "third")


def test_an_encoder_is_loaded_once_and_is_one() -> None:
    config = composed("model=nit_t2i_tiny")
    assert from_config.text_encoder(config) is from_config.text_encoder(composed("model=nit_t2i_tiny"))
    assert from_config.text_encoder(composed("model=nit_tiny")) is None
    other = from_config.text_encoder(composed("model=nit_t2i_tiny", "text_encoder.tokens=5"))
    assert isinstance(other, TextEncoder) and other.tokens == 5
    wrong = {**config, "text_encoder": {"_target_": "genfound.layouts.Packed", "patch_size": 1}}
    with pytest.raises(ValueError, match=r"^text_encoder._target_=genfound.layouts.Packed is no TextEncoder$"):
        from_config.text_encoder(wrong)
