"""What files of format 1 call differently: class paths in configurations, and names of parameters."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from genfound.config.compose import TARGET

CLASSES = {
    "genfound.data.image_folder.ImageFolder": "genfound.data.images.folder.ImageFolder",
    "genfound.data.image_tree.ImageTree": "genfound.data.images.imagenet.ImageTree",
    "genfound.data.shapes.Shapes": "genfound.data.images.shapes.Shapes",
    "genfound.data.published.VaVae": "genfound.data.latents.va_vae.VAVAE",
    "genfound.tokenizers.dc_ae.DcAe": "genfound.tokenizers.dc_ae.DCAE",
    "genfound.tokenizers.pixel.Pixel": "genfound.tokenizers.pixel.PixelTokenizer",
    "genfound.tokenizers.sd_vae.SdVae": "genfound.tokenizers.sd_vae.SDVAE",
    "genfound.tokenizers.vq_f4.VqF4": "genfound.tokenizers.vq_f4.VQF4",
}
"""Classes that moved; whether a file may name them is checked afterwards, as for any other."""

SOURCES = {
    "store": "genfound.data.latents.store.Store",
    "nit": "genfound.data.latents.nit.NiTLatents",
    "lightningdit": "genfound.data.latents.lightningdit.LightningDiTLatents",
}
"""`data.source`, which chose latents below the root of an option for images -> the class of an option of their own."""

EMBEDDERS = {
    r"^x_embedder\.(weight|bias)$": r"x_embedder.proj.\1",
    r"^t_embedder\.first\.": "t_embedder.mlp.0.",
    r"^t_embedder\.second\.": "t_embedder.mlp.2.",
}
DIT = EMBEDDERS | {
    r"^(blocks\.\d+\.mlp)\.0\.": r"\1.fc1.",
    r"^(blocks\.\d+\.mlp)\.2\.": r"\1.fc2.",
    r"\.adaln\.(weight|bias)$": r".adaLN_modulation.1.\1",
}
DIT_MOE = DIT | {
    r"\.mlp\.router\.": ".moe.gate.",
    r"\.mlp\.experts\.": ".moe.experts.",
    r"\.mlp\.shared\.fc1_g\.": ".moe.shared_experts.gate_proj.",
    r"\.mlp\.shared\.fc1_x\.": ".moe.shared_experts.up_proj.",
    r"\.mlp\.shared\.fc2\.": ".moe.shared_experts.down_proj.",
}
NORMED_ATTENTION = {r"\.attn\.qkv\.": ".attn.Wqkv.", r"\.attn\.proj\.": ".attn.out_proj."}
NAMES = {
    "genfound.backbones.dit.DiT": DIT,
    "genfound.backbones.sit.SiT": DIT,
    "genfound.backbones.fit.FiT": EMBEDDERS | {r"adaln\.": "adaLN_modulation."},
    "genfound.backbones.nit.NiT": DIT
    | {r"\.adaln\.0\.": ".adaLN_modulation.1.", r"(blocks\.\d+)\.adaln\.1\.": r"\1.adaLN_modulation.2."},
    "genfound.backbones.dit_moe.DiTMoE": DIT_MOE,
}
"""Class of a backbone -> patterns of its parameters' names and what they became."""


def config(old: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration whose `_target_`s are where these classes are now."""
    moved = {str(key): _moved(value) for key, value in old.items()}
    if isinstance(data := moved.get("data"), dict) and isinstance(source := data.pop("source", None), str):
        data[TARGET] = SOURCES.get(source, data.get(TARGET))
    return moved


def weights(old: Mapping[str, Tensor], model: Mapping[str, Any]) -> dict[str, Tensor]:
    """A state dict under today's names; `model` is that group of its configuration.

    The parameters of other packages' backbones are left as they are.
    """
    patterns = dict(NAMES.get(str(model[TARGET]), {}))
    if str(model[TARGET]).endswith(".DiTMoE") and model.get("qk_norm") != "none":
        patterns |= NORMED_ATTENTION
    return {_renamed(name, patterns): tensor for name, tensor in old.items()}


def _renamed(name: str, patterns: Mapping[str, str]) -> str:
    for pattern, new in patterns.items():
        name = re.sub(pattern, new, name)
    return name


def _moved(value: Any) -> Any:
    if isinstance(value, Mapping):
        named = value.get(TARGET)
        moved = {TARGET: CLASSES[named]} if isinstance(named, str) and named in CLASSES else {}
        return {key: _moved(inner) for key, inner in value.items()} | moved
    return [_moved(inner) for inner in value] if isinstance(value, list) else value
