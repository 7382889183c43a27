"""Weights of diffusers' autoencoders: from the hub, from a folder, or random."""

import importlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from genfound.config.environment import LAUNCH
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
        folder = locate(weights)
        check_class(folder / CONFIG, kind.name)
        model = _from_folder(model_class, folder)
    return model.eval().requires_grad_(False)


def locate(
    weights: str, download: bool = True, key: str = "tokenizer.weights", files: Sequence[str] = (CONFIG, WEIGHTS)
) -> Path:
    """The folder with the config and the weights: a local one, the hub's cache, or downloaded into it.

    Only a command itself downloads, none of the processes that it starts. `key` is what the user set.
    """
    folder = Path(weights).expanduser()
    if folder.is_dir():
        missing = [name for name in files if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(f"{key}={weights}: there is no {missing[0]} in this folder")
        return folder
    if folder.is_absolute() or len(folder.parts) != 2 or folder.parts[0] in (".", "..", "~"):
        raise FileNotFoundError(
            f"{key}={weights} is not a folder; give one with {' and '.join(files)}, a name on the "
            "Hugging Face hub, or random"
        )
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


def check_class(file: Path, wanted: str) -> None:
    """Raise a ValueError unless a config is of the wanted class."""
    try:
        found = json.loads(file.read_text())["_class_name"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{file} is damaged or is not the config of an autoencoder of diffusers") from None
    if found != wanted:
        way_out = f"; choose tokenizer={OPTIONS[found]}" if found in OPTIONS else ""
        raise ValueError(f"tokenizer={OPTIONS[wanted]} takes {wanted}, but {file} describes {found}{way_out}")


def option_of(folder: Path) -> str | None:
    """The option of `tokenizer` that takes the autoencoder of a folder, if it tells."""
    try:
        return OPTIONS.get(json.loads((folder.expanduser() / CONFIG).read_text())["_class_name"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


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
