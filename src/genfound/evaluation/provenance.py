"""What is evaluated: the weights of a model or images that are there, and how their samples were made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from genfound.data.images.sets import image_files, read_note
from genfound.evaluation import protocol
from genfound.evaluation.extraction import decoder_identity
from genfound.evaluation.protocol import SamplingRecord
from genfound.runtime import checkpoint_io, devices
from genfound.runtime.files import visible
from genfound.samplers import adapts
from genfound.tokenizers import Tokenizer

Config = Mapping[str, Any]


def is_images(path: Path) -> bool:
    """Whether a path is an npz file or a folder of images, not a model.

    Raises:
        FileNotFoundError: an empty folder.
    """
    if not path.is_dir():
        return path.suffix == ".npz"
    if (path / "config.yaml").is_file() or visible(path, "*.safetensors") or visible(path, "*.bin"):
        return False
    if not visible(path):
        raise FileNotFoundError(f"from={path} is an empty folder")
    return bool(image_files(path)[0])


def checkpoint_of(source: Path) -> Path:
    """The newest checkpoint of a run, since a run that is still training has another one later; else the path.

    Raises:
        FileNotFoundError: the run has none yet.
    """
    if not (source / "config.yaml").is_file():
        return source
    file = checkpoint_io.newest(source / "checkpoints")
    if file is None:
        raise FileNotFoundError(f"{source} has no checkpoint yet")
    return file


def model_identity(source: Path, network: str) -> dict[str, Any]:
    """Whose samples they are.

    Args:
        source: a checkpoint of a run, or another file or folder of weights.
        network: its hash.
    """
    run = source.parent.parent
    if source.suffix != ".ckpt" or not (run / "config.yaml").is_file():
        return {"from": str(source), "hash": network}
    seen = checkpoint_io.read(source)["images_seen"]
    return {"from": str(run), "checkpoint": source.name, "images_seen": seen, "hash": network}


def read_provenance(source: Path, hashed: str) -> tuple[dict[str, Any], SamplingRecord, Any]:
    """Whose images they are, how they were drawn, and of which size, by the note of their export if it is whole.

    Args:
        source: an npz file or a folder.
        hashed: of its images.

    Raises:
        ValueError: the note is damaged.
    """
    note = read_note(source) or {}
    drawing, subject = SamplingRecord.told(note.get("drawing")), note.get("subject")
    if not isinstance(subject, dict) or not {"from", "hash"} <= subject.keys() or drawing == SamplingRecord.unknown():
        if note:
            print(f"{source}: the protocol beside the images is not whole; their making is unknown", flush=True)
        return {"from": str(source), "hash": hashed, "images": str(source)}, SamplingRecord.unknown(), None
    return {**subject, "images": str(source)}, drawing, note.get("size")


def pin_guide_checkpoint(how: Config) -> dict[str, Any]:
    """Settings of drawing with one checkpoint of the run that is the weaker network of autoguidance."""
    guidance = dict(how["guidance"])
    if "weights" in guidance:
        guidance["weights"] = str(checkpoint_of(Path(guidance["weights"])))
    return {**how, "guidance": guidance}


def sampling_record(
    config: Config, how: Config, tokenizer: Tokenizer, device: torch.device, weak: str | None
) -> SamplingRecord:
    """How samples are made, in the words of the protocol.

    Args:
        config: conf/evaluate.yaml.
        how: the run's configuration with the sampler, guidance, byte rule and precision to use.
        tokenizer: decodes.
        device: draws.
        weak: hash of the weaker network of autoguidance.
    """
    return SamplingRecord(
        weights=config["weights"],
        sampler=dict(how["sampler"]),
        guidance={**how["guidance"], **({} if weak is None else {"hash": weak})},
        rope={key: value for key, value in config["rope"].items() if value is not None} or None,
        batch=config["batch"] if _couples(how["sampler"]) else None,
        labels=config["labels"],
        seed=config["seed"],
        precision=devices.precision(how["trainer"]["precision"], device),
        decoder=decoder_identity(tokenizer, how),
        uint8=how["sample"]["uint8"],
        versions=protocol.versions(),
    )


def _couples(sampler: Config) -> bool:
    """Whether the steps of an image depend on the others of its network call."""
    return adapts(sampler) and sampler["norm"] == "batch"
