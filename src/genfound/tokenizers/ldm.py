"""First stages in the files of CompVis/latent-diffusion and of Stable Diffusion, as autoencoders of diffusers.

A file is that of an autoencoder alone, or of a whole model, whose first stage is then taken. Where it tells no
`scale_factor`, that of the tokenizer's published autoencoder holds.
"""

import argparse
import importlib
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PREFIX = "first_stage_model."
PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "quantize.embedding.")
"""Of an autoencoder; such files may also hold its discriminator."""

RENAMED = (
    (r"\.down\.(\d+)\.block\.", r".down_blocks.\1.resnets."),
    (r"\.down\.(\d+)\.attn\.", r".down_blocks.\1.attentions."),
    (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    (r"\.up\.(\d+)\.block\.", r".up_blocks.\1.resnets."),
    (r"\.up\.(\d+)\.attn\.", r".up_blocks.\1.attentions."),
    (r"\.up\.(\d+)\.upsample\.", r".up_blocks.\1.upsamplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
)
"""Their parts of names -> those of diffusers, but for levels on the way up, which are counted the other way."""


class Inert:
    """What stands for a class of another program that a file names beside its weights."""

    def __init__(self, *_: Any, **__: Any) -> None: ...


BESIDE_WEIGHTS: list[Any] = [
    argparse.Namespace, (Inert, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"),
]  # fmt: skip
"""For `torch.serialization.safe_globals`: what checkpoints of Lightning 1 name; no code of it is imported."""


def read(file: Path) -> dict[str, Tensor]:
    """The tensors of a first stage under their own names, and `scale_factor` if the file has one.

    Raises:
        ValueError: it is damaged, or holds no first stage.
    """
    safetensors = importlib.import_module("safetensors")
    try:
        if zipfile.is_zipfile(file):
            with torch.serialization.safe_globals(BESIDE_WEIGHTS), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about unusual versions of pickle
                content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        else:
            content = importlib.import_module("safetensors.torch").load_file(file)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, KeyError, safetensors.SafetensorError) as error:
        reason = f"{error}".splitlines()[0][:150] if f"{error}" else type(error).__name__
        raise ValueError(f"{file} is damaged, or holds more than weights: {reason}") from None
    state = content.get("state_dict", content) if isinstance(content, dict) else {}
    named = {str(name).removeprefix(PREFIX): value for name, value in state.items() if isinstance(value, Tensor)}
    found = {name: value for name, value in named.items() if name.startswith((*PARTS, "scale_factor"))}
    if "post_quant_conv.weight" not in found or "encoder.conv_in.weight" not in found:
        raise ValueError(f"{file} holds no autoencoder of LDM; give a folder with one of diffusers, or its own file")
    return found


def config_of(state: Mapping[str, Tensor], file: Path) -> dict[str, Any]:
    """`_class_name` and the arguments of diffusers' class, that the shapes of a first stage tell."""
    levels = len({name.split(".")[2] for name in state if name.startswith("encoder.down.")})
    attended = [f"encoder.down.{level}.attn.0.norm.weight" in state for level in range(levels)]
    z, embedded = state["post_quant_conv.weight"].shape[:2]
    config = {
        "block_out_channels": [len(state[f"encoder.down.{level}.block.0.conv2.bias"]) for level in range(levels)],
        "down_block_types": [f"{'Attn' if attention else ''}DownEncoderBlock2D" for attention in attended],
        "up_block_types": [f"{'Attn' if attention else ''}UpDecoderBlock2D" for attention in reversed(attended)],
        "layers_per_block": len({n.split(".")[4] for n in state if n.startswith("encoder.down.0.block.")}),
        "mid_block_add_attention": "encoder.mid.attn_1.norm.weight" in state,
        "latent_channels": z,
    }
    if "scale_factor" in state:
        config["scaling_factor"] = float(state["scale_factor"])
    if (codebook := state.get("quantize.embedding.weight")) is not None:
        codes = {"num_vq_embeddings": len(codebook), "vq_embed_dim": embedded}
        return {"_class_name": "VQModel", **config, **codes}
    if z != embedded:
        raise ValueError(f"{file}: autoencoders with {embedded} channels from {z} are not known to diffusers")
    return {"_class_name": "AutoencoderKL", **config}


def to_diffusers(state: Mapping[str, Tensor], levels: int) -> dict[str, Tensor]:
    """The tensors under diffusers' names; the convolutions of attention are matrices there."""
    ours = {}
    for theirs, value in state.items():
        name = theirs
        for pattern, other in RENAMED:
            name = re.sub(pattern, other, name)
        name = re.sub(r"up_blocks\.(\d+)", lambda found: f"up_blocks.{levels - 1 - int(found[1])}", name)
        ours[name] = value[..., 0, 0] if "attentions" in name and value.ndim == 4 else value
    return {name: value for name, value in ours.items() if name != "scale_factor"}
