"""Weights of diffusers' autoencoders: from the hub, from a folder, from a file of LDM, or random."""

import importlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from genfound.config.environment import LAUNCH
from genfound.tokenizers import ldm
from genfound.tokenizers.base import LatentSpec

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
OPTIONS = {"AutoencoderKL": "sd_vae", "AutoencoderDC": "dc_ae", "VQModel": "vq_f4"}
"""Class of diffusers -> the tokenizer that takes it."""


class Architecture(NamedTuple):
    """A class of diffusers, and the constructor arguments of one of its models."""

    name: str
    official: Mapping[str, Any]  # of the published model
    tiny: Mapping[str, Any]  # what shrinks it to something for tests, of the same channels and stride


def latent_spec(config: Mapping[str, Any]) -> LatentSpec:
    """The shape of the latents of an autoencoder, by its config."""
    blocks = config.get("encoder_block_out_channels") or config["block_out_channels"]
    return LatentSpec(config.get("vq_embed_dim") or config["latent_channels"], 2 ** (len(blocks) - 1))


def scaling(config: Mapping[str, Any]) -> tuple[float, float]:
    """Scale and shift of an autoencoder by its config: latent = (h - shift) * scale."""
    return float(config["scaling_factor"]), float(config.get("shift_factor") or 0)


def load(kind: Architecture, weights: str) -> Any:
    """A frozen model of diffusers in eval mode, float32; for `weights` see `Autoencoder`."""
    diffusers = importlib.import_module("diffusers")
    diffusers.utils.logging.set_verbosity_error()
    model_class = getattr(diffusers, kind.name)
    if weights in ("random", "random_tiny"):
        smaller = kind.tiny if weights == "random_tiny" else {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = model_class(**{**kind.official, **smaller})
    else:
        place = locate(weights)
        config = {**kind.official, **read_config(place, kind.name)}
        model = _from_file(model_class, config, place) if place.is_file() else _from_folder(model_class, place)
    return model.eval().requires_grad_(False)


def locate(
    weights: str, download: bool = True, key: str = "tokenizer.weights", files: Sequence[str] = (CONFIG, WEIGHTS)
) -> Path:
    """The folder with the config and the weights: a local one, the hub's cache, or downloaded into it; or LDM's file.

    Only a command itself downloads, none of the processes that it starts. `key` is what the user set.
    """
    folder = Path(weights).expanduser()
    if WEIGHTS in files and folder.is_file():
        return folder
    if folder.is_dir():
        missing = [name for name in files if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(f"{key}={weights}: there is no {missing[0]} in this folder")
        return folder
    if folder.is_absolute() or len(folder.parts) != 2 or folder.parts[0] in (".", "..", "~"):
        hub = "a name on the Hugging Face hub, or random" if WEIGHTS in files else "or a name on the Hugging Face hub"
        raise FileNotFoundError(f"{key}={weights} is not a folder; give one with {' and '.join(files)}, {hub}")
    return _snapshot(weights, files, local_files_only=True) or _download(weights, download, key, files)


def _snapshot(name: str, files: Sequence[str], local_files_only: bool) -> Path | None:
    """The hub's copy of the files, or None if it is not whole."""
    hub = importlib.import_module("huggingface_hub")
    try:
        found = Path(hub.snapshot_download(name, allow_patterns=[*files], local_files_only=local_files_only))
    except (FileNotFoundError, ValueError):
        if not local_files_only:
            raise
        return None
    return found if all((found / file).is_file() for file in files) else None


def _download(name: str, allowed: bool, key: str, files: Sequence[str]) -> Path:
    if importlib.import_module("huggingface_hub.constants").HF_HUB_OFFLINE:
        reason = "HF_HUB_OFFLINE forbids a download"
    elif LAUNCH in os.environ:
        reason = "the processes of a command do not download"
    elif not allowed:
        reason = "it has not been downloaded"
    else:
        print(f"downloading {name} from the Hugging Face hub", flush=True)
        try:
            folder = _snapshot(name, files, local_files_only=False)
        except Exception as error:  # the hub's client passes on what its network libraries raise
            reason = f"{error}".splitlines()[0][:150] if f"{error}" else type(error).__name__
        else:
            if folder is not None:
                return folder
            reason = "the hub has no such files under this name"
    raise FileNotFoundError(
        f"{key}={name} is neither a folder nor in the cache of the Hugging Face hub: {reason}; "
        f"put its {' and '.join(files)} into a folder (python -m genfound.fetch does so where there is internet) and "
        f"give {key}=FOLDER"
    )


def read_config(place: Path, wanted: str) -> dict[str, Any]:
    """The config of an autoencoder in a folder, or what a file of LDM tells of it.

    Raises:
        ValueError: it is damaged, or not of the wanted class of diffusers.
    """
    file = place if place.is_file() else place / CONFIG
    config = _config(file)
    if (found := config["_class_name"]) != wanted:
        way_out = f"; choose tokenizer={OPTIONS[found]}" if found in OPTIONS else ""
        raise ValueError(f"tokenizer={OPTIONS[wanted]} takes {wanted}, but {file} describes {found}{way_out}")
    return config


def _config(file: Path) -> dict[str, Any]:
    if file.name != CONFIG:
        return ldm.config_of(ldm.read(file), file)
    try:
        config = json.loads(file.read_text())
        return {**config, "_class_name": str(config["_class_name"])}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{file} is damaged or is not the config of an autoencoder of diffusers") from None


def tensors(place: Path) -> Iterator[tuple[str, Any]]:
    """(name, NumPy array) of each weight in a folder or a file, in the order of names."""
    if place.is_file():
        yield from ((name, value.numpy()) for name, value in sorted(ldm.read(place).items()))
        return
    with importlib.import_module("safetensors").safe_open(place / WEIGHTS, "np") as file:
        yield from ((name, file.get_tensor(name)) for name in sorted(file.keys()))


def option_of(place: Path) -> str | None:
    """The option of `tokenizer` that takes the autoencoder of a folder or file, if it tells."""
    place = place.expanduser()
    try:
        return OPTIONS.get(_config(place if place.is_file() else place / CONFIG)["_class_name"])
    except (OSError, ValueError):
        return None


def _from_file(model_class: Any, config: Mapping[str, Any], file: Path) -> Any:
    """Load a file of LDM, and no other way than completely."""
    model = model_class(**{key: value for key, value in config.items() if key != "_class_name"})
    try:
        model.load_state_dict(ldm.to_diffusers(ldm.read(file), len(config["block_out_channels"])))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{file} does not fit {model_class.__name__}: {reason}") from None
    return model


def _from_folder(model_class: Any, folder: Path) -> Any:
    """Load a folder, and no other way than completely."""
    file = folder / WEIGHTS
    safetensors = importlib.import_module("safetensors")
    try:
        with safetensors.safe_open(file, "pt"):
            pass
    except (OSError, safetensors.SafetensorError) as error:
        way_out = f"remove {file.resolve()} and download it again"  # the hub's cache has links
        raise ValueError(f"{file} is damaged: {error}; {way_out}") from None
    try:
        model, info = model_class.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True
        )
    except (RuntimeError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{file} does not fit {folder / CONFIG}: {reason}") from None
    problems = {"missing": info["missing_keys"], "unexpected": info["unexpected_keys"]}
    found = [f"{len(keys)} keys {what} ({', '.join(sorted(keys)[:3])})" for what, keys in problems.items() if keys]
    if found:
        raise ValueError(f"{file} does not fit {folder / CONFIG}: {'; '.join(found)}")
    return model
