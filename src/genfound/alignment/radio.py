"""RADIO (arXiv 2312.06709), NiT's teacher: v2.5, whose networks have the form of DINOv2 with registers."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from genfound.alignment import vit
from genfound.runtime import checkpoint_io
from genfound.runtime.transformers_models import FILES, from_state

HEADS = {32: 2, 768: 12, 1024: 16, 1280: 16}
"""Width -> heads, of the published sizes (and of a small one for tests), which weights do not tell."""

PATCH = 16
PREFIXES = ("radio_model.", "base_model.", "model.")


class RADIO(vit.VisionTransformer):
    """The patch tokens of RADIO before its last norm, at 16 pixels per token (NiT's packed_trainer_c2i.py).

    `weights` may also be a released file, such as `radio-v2.5-h.pth.tar`.
    """

    mean = (0.48145466, 0.4578275, 0.40821073)
    std = (0.26862954, 0.26130258, 0.27577711)

    @classmethod
    def fetch(cls, weights: str | None, download: bool = True) -> Path | None:
        """As of `VisionTransformer`; a released file is what it is."""
        file = Path(str(weights)).expanduser()
        return file if file.is_file() else super().fetch(weights, download)

    def load(self, weights: str) -> Any:
        """From the hub, a folder, a released file, or random."""
        found = self.fetch(weights)
        if found is None:
            state: Mapping[str, Tensor] = tiny_state()
        else:
            state = read(found) if found.is_file() else checkpoint_io.read_safetensors(found / FILES[1])
        model = from_state("Dinov2WithRegisters", *converted(state, weights))
        model.layernorm = torch.nn.Identity()
        return model

    def pixels(self, images: Tensor, height: int, width: int) -> Tensor:
        """As in `VisionTransformer`, but resized before it is normalised, antialiased and to bytes, as by Pillow."""
        if images.shape[2:] != (height, width):
            resized = interpolate(images.float(), (height, width), mode="bicubic", antialias=True)
            images = resized.round().clamp(0, 255).to(torch.uint8)
        return super().pixels(images, height, width)

    def resampled(self, table: Tensor, rows: int, columns: int) -> Tensor:
        """The window at the top left of a square of the longer side (vit_patch_generator.py)."""
        side = max(rows, columns)
        square = interpolate(table, (side, side), mode="bilinear", align_corners=True)
        return square[:, :, :rows, :columns]


def read(file: Path) -> Mapping[str, Tensor]:
    """The state dict of a released file; no code in it is run."""
    content = checkpoint_io.read(file, [argparse.Namespace])
    state = content.get("state_dict_ema") or content.get("state_dict")
    if not isinstance(state, Mapping):
        raise ValueError(f"{file} is no release of RADIO: it has no state_dict")
    return state


def converted(state: Mapping[str, Tensor], origin: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and weights of Dinov2WithRegisters, from those of RADIO; only the class and register tokens lack
    positions there.
    """
    own: dict[str, Tensor] = {}
    for name, value in state.items():
        while prefix := next((p for p in PREFIXES if name.startswith(p)), None):
            name = name.removeprefix(prefix)  # noqa: PLW2901
        own[name] = value.float()
    try:
        tokens, grid = own["patch_generator.cls_token.token"], own["patch_generator.pos_embed"]
        embedder, width = own["patch_generator.embedder.weight"], grid.shape[2]
        depth = len({name.split(".")[1] for name in own if name.startswith("blocks.")})
        config = {
            "hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": HEADS[width],
            "patch_size": PATCH, "image_size": round(grid.shape[1] ** 0.5) * PATCH,
            "num_register_tokens": len(tokens) - 1,
            "mlp_ratio": len(own["blocks.0.mlp.fc1.weight"]) // width,
        }  # fmt: skip
        weights = {
            "embeddings.cls_token": tokens[None, :1],
            "embeddings.register_tokens": tokens[None, 1:],
            "embeddings.mask_token": torch.zeros(1, width),
            "embeddings.position_embeddings": torch.cat([torch.zeros(1, 1, width), grid], dim=1),
            "embeddings.patch_embeddings.projection.weight": embedder.view(width, 3, PATCH, PATCH),
            "embeddings.patch_embeddings.projection.bias": torch.zeros(width),
            "layernorm.weight": torch.ones(width),
            "layernorm.bias": torch.zeros(width),
        }
        for number in range(depth):
            weights |= _block(own, f"blocks.{number}.", f"encoder.layer.{number}.", width)
    except (KeyError, RuntimeError, IndexError) as error:
        raise ValueError(f"{origin} is no ViT of RADIO v2.5: {error}") from None
    return config, weights


def _block(own: Mapping[str, Tensor], theirs: str, ours: str, width: int) -> dict[str, Tensor]:
    weights = {f"{ours}layer_scale{number}.lambda1": torch.ones(width) for number in (1, 2)}
    for kind in ("weight", "bias"):
        parts = own[f"{theirs}attn.qkv.{kind}"].chunk(3)
        for name, part in zip(("query", "key", "value"), parts, strict=True):
            weights[f"{ours}attention.attention.{name}.{kind}"] = part
        weights[f"{ours}attention.output.dense.{kind}"] = own[f"{theirs}attn.proj.{kind}"]
        for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
            weights[f"{ours}{name}.{kind}"] = own[f"{theirs}{name}.{kind}"]
    return weights


def tiny_state(width: int = 32, depth: int = 2) -> dict[str, Tensor]:
    """Random weights of a small network, always the same."""
    shapes = {"patch_generator.cls_token.token": (8, width), "patch_generator.pos_embed": (1, 16, width)}
    shapes["patch_generator.embedder.weight"] = (width, 3 * PATCH**2)
    for number in range(depth):
        rows = {"attn.qkv": 3 * width, "attn.proj": width, "mlp.fc1": 4 * width, "mlp.fc2": width}
        for name, out in rows.items():
            into = 4 * width if name == "mlp.fc2" else width
            shapes |= {f"blocks.{number}.{name}.weight": (out, into), f"blocks.{number}.{name}.bias": (out,)}
        for name in ("norm1", "norm2"):
            shapes |= {f"blocks.{number}.{name}.{kind}": (width,) for kind in ("weight", "bias")}
    draw = torch.Generator().manual_seed(0)
    return {name: 0.1 * torch.randn(shape, generator=draw) for name, shape in shapes.items()}
