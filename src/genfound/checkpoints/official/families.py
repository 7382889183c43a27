"""Which published family a state dict is of, and how it becomes ours and theirs again."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from genfound.checkpoints.official import dig, dim, dit, dit_moe, fit, jit, ldm, lightningdit, nit
from genfound.checkpoints.official.projectors import is_projector

State = Mapping[str, Tensor]


class Family(NamedTuple):
    """A published repository."""

    options: Callable[[State], dict[str, Any]]  # constructor options that a state dict tells
    ours: Callable[[State], dict[str, Tensor]]  # official state dict -> our shapes and orders
    theirs: Callable[[State, int, tuple[int, int]], dict[str, Tensor]]  # the inverse, of a patch size and grid (h, w)
    ema_first: bool = False  # whether the first weights of its accelerate folders are the averaged ones
    tables: Callable[[Mapping[str, Any], tuple[int, int]], dict[str, Tensor]] = lambda model, grid: {}
    """What its files also hold, computed from a configuration and a grid."""
    content: Callable[[State], Mapping[str, Any]] = dict
    """What its own code wants a file of torch.save to hold."""
    averaged: Callable[[State], State] = lambda state: state
    """A state dict with the averages that it holds beside its live weights in their places."""
    objective: Callable[[State], dict[str, Any]] = lambda state: {}
    """Options of the objective that a state dict tells."""


FIT = Family(fit.official_options, fit.from_official, lambda state, patch_size, grid: dict(state))
FAMILIES = {
    "dit": Family(dit.official_options, dit.from_official, dit.to_official),
    "sit": Family(dit.options_of_sit, dit.from_official, dit.to_official),
    "fit": FIT,
    "fitv2": FIT,
    "nit": Family(nit.official_options, nit.from_official, lambda s, p, grid: nit.to_official(s, p), ema_first=True),
    "dit_moe": Family(dit_moe.official_options, dit_moe.from_official, dit_moe.to_official),
    "lightningdit": Family(
        lightningdit.official_options,
        lightningdit.from_official,
        dit.to_official,
        tables=lambda config, grid: lightningdit.tables(config["model"], grid),
    ),
    "dim": Family(dim.official_options, dim.from_official, dim.to_official),
    "dig": Family(dig.official_options, dig.from_official, dig.to_official),
    "jit": Family(jit.official_options, jit.from_official, jit.to_official, content=jit.training_checkpoint),
    "ldm": Family(
        ldm.official_options,
        ldm.from_official,
        lambda state, patch_size, grid: ldm.to_official(state),
        tables=ldm.tables,
        content=lambda state: {"state_dict": dict(state)},
        averaged=ldm.averaged,
        objective=ldm.objective_options,
    ),
}

RELEASES = {
    "dit": {"DiT-XL-2-256x256.pt", "DiT-XL-2-512x512.pt"},
    "sit": {"SiT-XL-2-256.pt", "SiT-XL-2-256x256.pt"},
    "fitv2": {"FiTv2_XL", "FiTv2_3B"},
    "fitv2_hr": {"FiTv2_XL_HRFT", "FiTv2_3B_HRFT"},
}
"""Releases whose weights look like those of another -> the names under which their files or folders are published."""

LIGHTNINGDIT = (
    "feat_rope.freqs_cos",
    "blocks.0.norm1.weight",
    "blocks.0.mlp.w12.weight",
    "blocks.0.attn.q_norm.weight",
)
"""Tensors beside DiT's of which LightningDiT has at least one, unless all its flags are off."""


OWN = {
    "x_embedder.proj1.weight": "jit", "blocks.0.attn.gk_proj.0.weight": "dig", dim.PATCHES: "dim",
    "model.diffusion_model.input_blocks.0.0.weight": "ldm",
}  # fmt: skip
"""Tensors that only one family has."""


def release_of(path: Path, args: Mapping[str, Any]) -> str | None:
    """What the arguments of a training script tell, or the whole name of a published file or folder."""
    if "path_type" in args:
        return "sit"
    model = str(args.get("model")).partition("-")[0].lower()  # e.g. DiT-XL/2
    if model in ("dit", "sit"):
        return model
    names = {path.name, path.parent.name}
    return next((release for release, published in RELEASES.items() if names & published), None)


def family_of(state: State, release: str | None) -> str:
    """The name of the family of an official state dict; `release` tells DiT from SiT, whose weights look alike."""
    if (own := next((family for name, family in OWN.items() if name in state), None)) is not None:
        return own
    if "final_layer.linear.weight" not in state or "x_embedder.proj.weight" not in state:
        first = ", ".join(list(state)[:3])
        raise ValueError(f"these weights are of none of {', '.join(FAMILIES)} (their names begin with {first})")
    if any(name.startswith("blocks.0.moe.") for name in state):
        return "dit_moe"
    if state["x_embedder.proj.weight"].ndim == 2:
        rows, columns = len(state["final_layer.linear.weight"]), state["x_embedder.proj.weight"].shape[1]
        return "fit" if rows == 2 * columns else "fitv2"
    if "pos_embed" not in state:
        return "nit"
    if found := [name for name in LIGHTNINGDIT if name in state]:
        aligned = any(map(is_projector, state))  # REPA's SiT may normalise queries and keys too
        return "sit" if aligned and found == ["blocks.0.attn.q_norm.weight"] else "lightningdit"
    release = "sit" if any(map(is_projector, state)) else release
    if release not in ("dit", "sit", "lightningdit"):
        ways = "hints.family=dit or hints.family=sit, or, of one without its flags, hints.family=lightningdit"
        raise ValueError(f"these weights fit DiT and SiT alike; say {ways}")
    return release
