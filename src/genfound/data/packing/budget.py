"""Tokens of images and packs, and how many micro-batches a global step has."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from genfound.config.checks import integer
from genfound.data.images.base import ImageSource
from genfound.data.packing.batch_plan import MicroBatch
from genfound.data.packing.order import Order
from genfound.data.packing.packer import in_order
from genfound.layouts import Dense, Layout, Packed
from genfound.objectives.weighting import image_weight
from genfound.tokenizers import LatentSpec

Config = Mapping[str, Any]


def batch_size(config: Config) -> int:
    """Images of a dense micro-batch: `data.batch_size`, or the most below it that divide the step of the recipe."""
    micro: int = config["data"]["batch_size"]
    integer("data.batch_size", micro, 1)
    recipe = config["optimizer"]["images_per_step"]
    if config["batch"]["images"] is not None:
        return micro
    return next(n for n in range(micro, 0, -1) if recipe % n == 0)


def micro_batches(config: Config, ranks: int) -> int:
    """Micro-batches of all ranks in a global step."""
    if config["layout"]["name"] == "dense":
        micro = batch_size(config)
        images = config["batch"]["images"] or config["optimizer"]["images_per_step"]
        per_step, rest = divmod(images, micro)
        if rest or not per_step:
            raise ValueError(f"batch.images={images} must be a multiple of data.batch_size={micro}; set one of them")
    else:
        tokens = config["optimizer"]["tokens_per_step"]
        per_step = config["batch"]["packs"] or max(round(tokens / config["data"]["max_tokens"]), 1)
    if per_step % ranks:
        nodes = config["trainer"]["num_nodes"]
        devices = f"trainer.devices={ranks // nodes}" + (f" on each of trainer.num_nodes={nodes}" if nodes > 1 else "")
        step = f"a global step of {per_step} micro-batches cannot be shared by {devices}"
        raise ValueError(f"{step}; set batch.packs to a multiple (dense: batch.images, or data.batch_size)")
    return per_step


def token_budget(config: Config, tokens: np.ndarray) -> int:
    """Tokens of a pack."""
    budget: int = config["data"]["max_tokens"]
    most = int(tokens.max())
    if most > budget:
        raise ValueError(f"an image has {most} tokens, more than data.max_tokens={budget}; raise data.max_tokens")
    return budget


def max_images(tokens: np.ndarray, budget: int) -> int:
    """Rows of a static pack: twice what a pack holds on average."""
    return math.ceil(2 * budget / float(tokens.mean()))


def token_counts(images: ImageSource, spec: LatentSpec, patch_size: int) -> np.ndarray:
    """(n,) tokens of each image."""
    return (images.sizes // (spec.stride * patch_size)).prod(axis=1)


def held_out_batches(config: Config, tokens: np.ndarray, layout: Layout, images: int, weight: str) -> list[MicroBatch]:
    """One step of the first held-out images of a fixed order, each once and in order, whatever the ranks are."""
    if not len(tokens):
        return []
    budget, rows = math.inf, batch_size(config)
    if not isinstance(layout, Dense):
        budget = token_budget(config, tokens)
        static = layout.max_images if isinstance(layout, Packed) else None
        rows = static or max_images(tokens, budget)
    order = Order(len(tokens), 0)
    indices = [order[k] for k in range(min(images, len(tokens)))]
    counts = [int(tokens[i]) for i in indices]
    total = float(image_weight(np.array(counts, dtype=float), weight).sum())
    return [
        MicroBatch(j, tuple(ks), tuple(indices[k] for k in ks), sum(counts[k] for k in ks), 0, total, len(indices))
        for j, ks in enumerate(in_order(counts, budget, rows))
    ]
