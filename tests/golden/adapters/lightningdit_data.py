"""LightningDiT: its shards of latents, their statistics, and how they are normalised."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from genfound import build
from genfound.data.images.views import ImageViews
from genfound.data.latents.lightningdit import LightningDiTLatents
from genfound.data.latents.stored_tokenizer import StoredTokenizer, TokenizerInfo, stored_tokenizer
from genfound.data.latents.va_vae import statistics
from genfound.tokenizers import LatentSpec
from tests.golden.adapters import Results, adapter
from tests.golden.fill import unit

STRIDE = 16


def write(config: Mapping[str, Any], root: Path) -> None:
    """Shards as the official extraction leaves them."""
    first, channels, size = 0, config["channels"], config["size"]
    for i, count in enumerate(config["shards"]):
        shape = (count, channels, size, size)
        both = {name: 2 * torch.from_numpy(unit(f"{name}.{i}", shape)) + 0.5 for name in ("latents", "latents_flip")}
        labels = torch.arange(first, first + count)
        save_file({**both, "labels": labels}, root / f"latents_rank{i:02d}_shard000.safetensors")
        first += count


def tokenizer(config: Mapping[str, Any], root: Path) -> StoredTokenizer:
    """What normalises: the statistics of the shards, or one factor for all channels."""
    if config["latent_norm"]:
        options = {
            "_target_": "genfound.data.latents.va_vae.VAVAE",
            "weights": str(root),
            "stride": STRIDE,
            "multiplier": config["latent_multiplier"],
        }
        load = functools.partial(build.tokenizer, {"tokenizer": options})
        return stored_tokenizer(
            {"_target_": "genfound.data.latents.lightningdit.LightningDiTLatents", "root": str(root)}, options, load
        )
    spec = LatentSpec(config["channels"], STRIDE)
    described = TokenizerInfo("sd_vae", "random", None, spec, config["latent_multiplier"], 0.0, stochastic=False)
    return StoredTokenizer(described, has_variance=False, load=lambda: NotImplemented)


@adapter("lightningdit", "latent_dataset")
def latent_dataset(fixture: Mapping[str, Any]) -> Results:
    """The first, the middle and the last image, mirrored or not, and the statistics of all."""
    config = fixture["config"]
    side = config["size"] * STRIDE
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write(config, root)
        spec = LatentSpec(config["channels"], STRIDE)
        source = LightningDiTLatents(root, ImageViews("square", side, STRIDE, side**2), None, "train", True, spec)
        codec = tokenizer(config, root)
        count = len(source.labels)
        chosen = [0, count // 2, count - 1]

        def items(mirrored: bool) -> Tensor:
            return codec.normalise(torch.stack([source.moments(i, mirrored) for i in chosen]))

        mean, std = statistics(root)
        labels = source.labels[chosen]
        return {
            "mean": mean, "std": std, "plain": items(False), "flip": items(True),
            "plain_labels": labels, "flip_labels": labels,
        }  # fmt: skip
