"""The data set of a run as uint8 images: also of a run on stored latents, which its tokenizer decodes."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from genfound import build
from genfound.config import compose
from genfound.config.compose import TARGET
from genfound.data.images.base import LatentSource, PictureSource
from genfound.data.images.pixels import to_uint8
from genfound.data.images.sets import ImageSet, Sourced
from genfound.data.latents.manifest import read_manifest
from genfound.data.packing.collate import Normaliser
from genfound.evaluation.provenance import decoder_identity
from genfound.runtime.files import digest
from genfound.tokenizers import LatentSpec

STORE = "genfound.data.latents.store.Store"


@dataclass(frozen=True)
class RunDataset:
    """The data set of a run: its configuration, the shape of its latents, and the number of its classes."""

    config: Mapping[str, Any]
    spec: LatentSpec
    classes: int

    @property
    def stored(self) -> bool:
        """Whether it consists of latents."""
        return build.reads_latents(self.config)

    def images(self, split: str, device: torch.device | str = "cpu") -> ImageSet:
        """Its images; `split` is `train` or `val`, and the device decodes stored latents."""
        source = build.source(self.config, self.spec, split)
        found = len(source.class_names)
        if found != self.classes:
            root = self.config["data"].get("root")
            raise ValueError(f"data.root={root} has {found:,} classes, and the run was trained on {self.classes:,}")
        if isinstance(source, LatentSource):
            return DecodedLatents(source, self.config, torch.device(device))
        return Sourced(cast(PictureSource, source))

    def of_store(self, root: Path) -> RunDataset:
        """The latents of a store in the place of its own images."""
        manifest, spec = read_manifest(root), self.spec
        made = manifest["tokenizer"]
        if (made["channels"], made["stride"]) != (spec.channels, spec.stride):
            theirs = f"{made['channels']} channels at stride {made['stride']}"
            ours = f"{spec.channels} at {spec.stride}"
            raise ValueError(
                f"reference={root} holds latents of another tokenizer ({theirs}, the run's have {ours}); give images"
            )
        store = {TARGET: STORE, "root": str(root), "holdout": manifest["source"]["holdout"], "flip": False}
        known = compose.read_option("data", "latent_store").keys()
        own = {key: value for key, value in self.config["data"].items() if key in known}
        data = {"max_image_tokens": None, **own, **store}
        return replace(self, config={**self.config, "data": data}, classes=len(manifest["classes"]))


class DecodedLatents:
    """Stored latents as images: the means, decoded by the tokenizer of a run and made bytes by its rule."""

    def __init__(self, source: LatentSource, config: Mapping[str, Any], device: torch.device) -> None:
        self.source = source
        self.sizes, self.labels = source.sizes, source.labels
        self.rule = config["sample"]["uint8"]
        self.stored = build.training_tokenizer(config)
        self.tokenizer = build.tokenizer(config)
        decoder = json.dumps(decoder_identity(self.tokenizer, config))
        self.key = digest(source.fingerprint, source.sizes.tobytes(), source.labels.tobytes(), self.rule, decoder)
        self.device = device
        self._one_at_a_time = threading.Lock()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, number: int) -> np.ndarray:
        """(height, width, 3) uint8."""
        moments = self.source.moments(number, mirrored=False)[None].float()
        with self._one_at_a_time, torch.no_grad():
            latent = cast(Normaliser, self.stored).normalise(moments).to(self.device)
            return to_uint8(self.tokenizer.decode(latent)[0], self.rule)
