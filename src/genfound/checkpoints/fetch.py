"""Weights that others publish, downloaded where there is internet for machines that have none."""

import functools
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from genfound import build
from genfound.alignment import from_config
from genfound.config import targets
from genfound.metrics import extractor
from genfound.runtime.files import atomic_write, check_folder
from genfound.runtime.transformers_models import FILES
from genfound.text import gemma
from genfound.text.from_config import fetch_text_encoder, text_encoder
from genfound.tokenizers.weights import CONFIG, WEIGHTS


def fetch(config: Mapping[str, Any], inception: bool, to: Path | None) -> list[str]:
    """Download what is not at hand, read it as a training would, and say where it is and what to set.

    Args:
        config: of the command, has tokenizer, alignment and text_encoder.
        inception: whether the Inception weights of evaluations are wanted too.
        to: a folder that gets a copy of all; without one, weights stay in the caches of their libraries.

    Raises:
        FileNotFoundError, ValueError: they cannot be downloaded, or are damaged.
    """
    if to is not None:
        check_folder("to", to)
    tokenizer = config["tokenizer"]
    found, settings = [f"tokenizer {build.name_of(tokenizer)} needs no weights of the hub"], []
    if folder := build.fetch_tokenizer(config):
        build.tokenizer(config)
        if folder.is_file():
            settings.append(f"tokenizer.weights={folder.resolve()}")
        elif to is None:
            settings.append("HF_HUB_OFFLINE=1 in the environment")
        else:
            folder = _copied(folder, to / Path(tokenizer["weights"]).name, (CONFIG, WEIGHTS))
            settings.append(f"tokenizer.weights={folder.resolve()}")
        found = [f"tokenizer {build.name_of(tokenizer)}, {tokenizer['weights']}: {folder}"]
    for name, path in from_config.fetch_teachers(config).items():
        options = config["alignment"]["teachers"][name]
        from_config.load_teacher(options, targets.trusted(config))
        if to is not None and path.is_dir():
            path = _copied(path, to / Path(options["weights"]).name, FILES)  # noqa: PLW2901
        found.append(f"teacher {name}, {options['weights']}: {path}")
        settings.append(f"alignment.teachers.{name}.weights={path.resolve()}")
    if (folder := _of_text(config, to)) is not None:
        found.append(f"text encoder, {config['text_encoder']['weights']}: {folder}")
        settings.append(f"text_encoder.weights={folder.resolve()}")
    if inception:
        file = extractor.download(to or Path(torch.hub.get_dir()) / "checkpoints")
        found.append(f"Inception: {file}")
        settings.append(f"extractor_weights={file.resolve()} of genfound.evaluate")
    return found + [f"on machines without internet that see these files, set {setting}" for setting in settings]


def _of_text(config: Mapping[str, Any], to: Path | None) -> Path | None:
    """Where the weights of the text encoder are, if it has any."""
    folder = fetch_text_encoder(config)
    if folder is None:
        return None
    text_encoder(config)
    return folder if to is None else _copied(folder, to / Path(config["text_encoder"]["weights"]).name, gemma.FILES)


def _copied(folder: Path, to: Path, names: Sequence[str]) -> Path:
    """A folder with these files of another one."""
    for name in names:
        atomic_write(to / name, functools.partial(shutil.copyfile, folder / name))
    return to
