"""LDM's released checkpoints: names and options (github.com/CompVis/latent-diffusion, ddpm.py and openaimodel.py).

One state dict has the U-Net, the table of classes, the first stage, the tables of the process and sometimes averages.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from genfound import build
from genfound.objectives.gaussian import Gaussian
from genfound.objectives.process import scaled_linear

UNET, CLASSES, AVERAGES, FIRST_STAGE = "model.diffusion_model.", "cond_stage_model.", "model_ema.", "first_stage_model."
PARTS = ("time_embed.", "label_emb.", "input_blocks.", "middle_block.", "output_blocks.", "out.")
"""Of the U-Net."""

TABLES = (
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
    "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2",
)  # fmt: skip
"""Of the process, each (T,)."""

RECIPE = (1000, 0.0015, 0.0195)
"""Steps, first and last beta of `objective=gaussian_ldm`."""

LEAST = 1e-20
"""Of the posterior's variance before its logarithm."""

OUT = "input_blocks.{}.0.out_layers.3.bias"
"""A vector of as many numbers as a block has channels."""

IMAGENET = 1000
"""Rows of a table that has no null class."""


def official_options(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Options of `LDM` that an official state dict tells; not the number of heads, nor the order of attention's rows.

    A table of n rows is taken for n - 1 classes and the null class, but one of 1,000 for that many classes.

    Raises:
        ValueError: the condition is none of `LDM`, such as a text.
    """
    own = from_official(state)
    width, channels = own["time_embed.0.weight"].shape[1], own["input_blocks.0.0.weight"].shape[1]
    crossed = [name for name in own if name.endswith("attn2.to_k.weight")]
    table = own.get("cond_stage_model.embedding.weight" if crossed else "label_emb.weight")
    if crossed and table is None:
        raise ValueError("this latent diffusion model has no classes as its condition, and others are not known")
    rows = 1 if table is None else len(table)
    null = table is not None and rows != IMAGENET
    return {
        "channels": channels,
        "num_classes": rows - null,
        "null_class": null,
        "width": width,
        "conditioning": "cross_attention" if crossed else "none" if table is None else "embedding",
        **({"context_width": own[crossed[0]].shape[1]} if crossed else {}),
        "transformer_depth": len({name.split(".transformer_blocks.")[1].split(".")[0] for name in crossed}) or 1,
        "scale_shift_norm": len(own["input_blocks.1.0.emb_layers.1.bias"]) == 2 * len(own[OUT.format(1)]),
        "learn_sigma": len(own["out.2.weight"]) == 2 * channels,
        **_levels(own, width),
    }


def _levels(own: Mapping[str, Tensor], width: int) -> dict[str, Any]:
    """Options that the blocks tell: those between two levels are convolutions, residual blocks, or without weights."""
    weighted = {int(name.split(".")[1]) for name in own if name.startswith("input_blocks.")}
    count = 1 + max(weighted)
    convolutions = sum(name.endswith(".op.weight") for name in own)
    residual = sum(bool(re.fullmatch(r"output_blocks\.\d+\.[12]\.in_layers\.0\.weight", name)) for name in own)
    levels = 1 + (convolutions or residual or count - len(weighted))
    depth = count // levels - 1
    firsts = [1 + level * (depth + 1) for level in range(levels)]
    attended = [f"input_blocks.{first}.1.norm.weight" in own for first in firsts]
    return {
        "patch_size": 2 ** (levels - 1),
        "depth": depth,
        "channel_mult": [len(own[OUT.format(first)]) // width for first in firsts],
        "attention_resolutions": [2**level for level, attention in enumerate(attended) if attention],
        "resblock_updown": residual > 0,
        "conv_resample": len(weighted) == count,
    }


def objective_options(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Options of `Gaussian` that the tables of a file tell, where they are not those of its recipe.

    Raises:
        ValueError: betas that are not `scaled_linear`.
    """
    if (betas := state.get("betas")) is None or _like(betas, *RECIPE):
        return {}
    first, last = float(betas[0]), float(betas[-1])
    if not _like(betas, len(betas), first, last):
        raise ValueError("betas: squares of evenly spaced numbers are expected")
    return {"timesteps": len(betas), "betas": [first, last]}


def _like(betas: Tensor, steps: int, first: float, last: float) -> bool:
    """Whether they are those of `scaled_linear`, up to the rounding of 16 bits."""
    wanted = scaled_linear(steps, first, last).float()
    return len(betas) == steps and torch.allclose(betas.float(), wanted, rtol=2e-3, atol=0)


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The U-Net and the table of classes of a file, or of a U-Net alone; all else is left out."""
    named = {name.removeprefix("model.").removeprefix("diffusion_model."): value for name, value in state.items()}
    return {name: value for name, value in named.items() if name.startswith((*PARTS, CLASSES))}


def to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `from_official`, of a whole file's names."""
    return {name if name.startswith(CLASSES) else f"{UNET}{name}": value for name, value in state.items()}


def averaged(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With the averages of a file in place of the live weights of the U-Net, where it has some."""
    names = {
        f"{AVERAGES}{name.removeprefix('model.').replace('.', '')}": name for name in state if name.startswith(UNET)
    }
    return {**state, **{name: state[average] for average, name in names.items() if average in state}}


def tables(config: Mapping[str, Any], grid: tuple[int, int]) -> dict[str, Tensor]:
    """The tables of a configuration's process, float32; none of a flow."""
    objective = build.objective(config)
    return process_tables(objective) if isinstance(objective, Gaussian) else {}


def process_tables(objective: Gaussian) -> dict[str, Tensor]:
    """See `TABLES`."""
    found = {name: getattr(objective.process.tables, name) for name in TABLES}
    found["posterior_log_variance_clipped"] = found["posterior_variance"].clamp(min=LEAST).log()
    return {name: value.float() for name, value in found.items()}
