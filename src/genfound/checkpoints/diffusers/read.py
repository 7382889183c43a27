"""Folders of diffusers, read: configuration and weights, never their code.

Taken are diffusers' own DiT (`DiTPipeline`), what `write` makes, and folders of others whose weights bear the names
of the official repositories; whole, or their transformer/ alone.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from genfound.checkpoints import formats
from genfound.checkpoints.diffusers import native
from genfound.checkpoints.diffusers.write import KEYS
from genfound.data.images.names import unique

STEM = "diffusion_pytorch_model"
FAMILY = {
    "OfficialDiT": "dit",
    "SiT": "sit",
    "FiT": None,  # FiT or FiTv2, as their shapes tell
    "NiT": "nit",
    "DiTMoE": "dit_moe",
    "LightningDiT": "lightningdit",
    "JiT": "jit",
    "DiG": "dig",
    **dict.fromkeys((name.removesuffix("Transformer2DModel") for name in native.CLASSES), "dit"),
}
"""Class of a network, without Transformer2DModel -> its family."""

OURS = {"unused_half", "rope_scaling"}
"""Keys of a config.json that only ours have: those of others mean other things in part."""

WHOLE = ("channels", "num_classes", "patch_size", "width", "depth", "heads", "top_k", "experts")
"""Options that are numbers in any config.json."""


class Folder(NamedTuple):
    """What is in a folder beside its weights."""

    path: Path  # of transformer/
    config: dict[str, Any]  # transformer/config.json
    pipeline: dict[str, Any]  # model_index.json
    vae: Path | None

    @property
    def native(self) -> bool:
        """Whether it is diffusers' own DiT."""
        return self.config["_class_name"] in native.CLASSES

    @property
    def family(self) -> str | None:
        """The family or release of its network, where its class and its positions tell it."""
        if self.config.get("custom_freqs", "normal") != "normal" and "FiT" in self.config["_class_name"]:
            return "fitv2_hr"  # in the words of others
        return FAMILY[self.config["_class_name"].removesuffix("Transformer2DModel")]

    @property
    def note(self) -> dict[str, Any] | None:
        """What `write` has noted about it."""
        files = _weight_files(self.path)
        return formats.ours(files[0]) if len(files) == 1 else None

    @property
    def class_names(self) -> list[str] | None:
        """By its index; where two are equal, with their numbers."""
        try:
            names = [str(name) for _, name in sorted((int(k), name) for k, name in self.pipeline["id2label"].items())]
        except (KeyError, AttributeError, ValueError):
            return None
        return unique(names)

    def options(self) -> dict[str, Any]:
        """Options of the backbone that its config.json tells; of folders of others, those that mean the same."""
        config = self.config
        if self.native:
            renamed = {"depth": "num_layers", "heads": "num_attention_heads", "channels": "in_channels"}
            told = {ours: config[key] for ours, key in renamed.items() if key in config}
            told |= {"patch_size": config.get("patch_size"), "width": _product(config)}
            told = {key: value for key, value in told.items() if value is not None}
        else:
            names = {theirs: ours for ours, theirs in KEYS.items()}
            told = {names.get(key, key): value for key, value in config.items() if not key.startswith("_")}
            told.pop("input_size", None)
            if OURS.isdisjoint(told):
                told = {key: value for key, value in told.items() if key in WHOLE}
        for key in WHOLE:
            if key in told and type(told[key]) is not int:
                raise ValueError(f"{self.path / 'config.json'} says {key}={told[key]}, which must be a whole number")
        return told

    def state(self) -> dict[str, Tensor]:
        """Its weights under official names."""
        found: dict[str, Tensor] = {}
        for file in _weight_files(self.path):
            found |= formats.read(file).choose("ema", file)
        side = self.config.get("sample_size")
        return native.from_native(found, side if isinstance(side, int) else 32, self.path) if self.native else found

    def check(self, known: Mapping[str, Any]) -> None:
        """Raise a ValueError if config.json says something else of the network than its weights, or our note, do."""
        for key, value in self.options().items():
            if key in WHOLE and known.get(key) not in (None, value):
                raise ValueError(f"{self.path / 'config.json'} says {key}={value}, and its weights {known[key]}")


def is_folder(path: Path) -> bool:
    """Whether this is a whole folder of diffusers."""
    return (path / "model_index.json").is_file() or (path / "transformer" / "config.json").is_file()


def folder(path: Path) -> Folder | None:
    """A folder of diffusers; None for anything else.

    Raises:
        FileNotFoundError, ValueError: it is one, but without a network, or of a network that is not known.
    """
    whole = is_folder(path)
    inner = path / "transformer" if whole else path
    if not (inner / "config.json").is_file():
        if whole:
            raise FileNotFoundError(f"{path} is a folder of diffusers without transformer/config.json")
        return None
    config = _read_json(inner / "config.json")
    kind = config.get("_class_name")
    if kind is None and not whole:
        return None
    if not isinstance(kind, str) or kind.removesuffix("Transformer2DModel") not in FAMILY:
        known = ", ".join(f"{name}Transformer2DModel" for name in FAMILY)
        raise ValueError(f"{inner / 'config.json'}: {kind} is no network of ours; these are: {known}")
    vae = inner.parent / "vae"
    index = inner.parent / "model_index.json"
    has_vae = inner.name == "transformer" and (vae / "config.json").is_file()
    return Folder(inner, config, _read_json(index) if index.is_file() else {}, vae if has_vae else None)


def _weight_files(path: Path) -> list[Path]:
    """The files of weights: whole, in shards, or of a variant; safetensors where there are such."""
    for kind in ("safetensors", "bin"):
        for name in (f"{STEM}.{kind}", f"{STEM}.*.{kind}", f"{STEM}.{kind}.index.json", f"{STEM}.{kind}.index.*.json"):
            if not (found := sorted(path.glob(name))):
                continue
            if found[0].suffix != ".json":
                return found[:1]
            shards = {*_read_json(found[0]).get("weight_map", {}).values()}
            if wrong := [shard for shard in shards if not isinstance(shard, str) or Path(shard).name != shard]:
                raise ValueError(f"{found[0]}: {wrong[0]} is no file beside it")
            if missing := [shard for shard in sorted(shards) if not (path / shard).is_file()]:
                raise FileNotFoundError(f"{path} has no {missing[0]}, which {found[0].name} names")
            return [path / shard for shard in sorted(shards)]
    raise FileNotFoundError(f"{path} has no weights: no {STEM}.safetensors, nor its shards")


def _product(config: Mapping[str, Any]) -> Any:
    heads, size = config.get("num_attention_heads"), config.get("attention_head_dim")
    return heads * size if isinstance(heads, int) and isinstance(size, int) else None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} is damaged: it holds no keys")
    return content
