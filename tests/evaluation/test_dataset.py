from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from genfound import build
from genfound.evaluation.references import DecodedLatents


def decoded(monkeypatch: pytest.MonkeyPatch, precision: str, value: float) -> DecodedLatents:
    """Latents with a decoder of one weight."""
    network = nn.Linear(1, 1, bias=False)
    nn.init.constant_(network.weight, value)
    monkeypatch.setattr(build, "tokenizer", lambda _: SimpleNamespace(model=network))
    monkeypatch.setattr(build, "training_tokenizer", lambda _: None)
    source: Any = SimpleNamespace(fingerprint="f", sizes=np.zeros((2, 2), np.int64), labels=np.zeros(2, np.int64))
    config = {"sample": {"uint8": "round"}, "tokenizer": {"_target_": "mine.codec.Codec", "precision": precision}}
    return DecodedLatents(source, config, torch.device("cpu"))


def test_the_key_of_decoded_latents_follows_the_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    made = [("fp32", 1.0), ("fp32", 1.0), ("bf16", 1.0), ("fp32", 2.0)]
    keys = [decoded(monkeypatch, *options).key for options in made]
    assert keys[0] == keys[1] and len(set(keys)) == 3
