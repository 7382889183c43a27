"""What is evaluated, the weights of a model or images that are there, and how their samples were made."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from genfound import build
from genfound.backbones.base import Backbone
from genfound.checkpoints.diffusers.read import is_folder
from genfound.config.compose import PARTIAL, TARGET
from genfound.data.images.sets import image_files, read_note
from genfound.evaluation.protocol import LIBRARIES, SamplingRecord
from genfound.loggers.provenance import versions
from genfound.metrics.extractor import tensors_hash
from genfound.runtime import checkpoint_io, receipts
from genfound.runtime.files import digest, visible
from genfound.sampling.pipeline import Pipeline
from genfound.tokenizers import Tokenizer

Config = Mapping[str, Any]
NO_CHANGE = ("attention", "activation_checkpointing")
"""Options of a model that say how, not what, it computes."""


def is_images(path: Path) -> bool:
    """Whether a path is an npz file or a folder of images, not a model."""
    if not path.is_dir():
        return path.suffix == ".npz"
    weights = visible(path, "*.safetensors") or visible(path, "*.bin")
    if weights or (path / "config.yaml").is_file() or is_folder(path):
        return False
    if not visible(path):
        raise FileNotFoundError(f"from={path} is an empty folder")
    return bool(image_files(path)[0])


def model_identity(source: Path) -> dict[str, Any]:
    """Whose samples they are: of a checkpoint of a run, or of another file or folder of weights."""
    run = source.parent.parent
    if source.suffix != ".ckpt" or not (run / "config.yaml").is_file():
        return {"from": str(source)}
    receipt = receipts.head_at(run / receipts.FILE, source.name)
    known = {} if receipt is None else {"receipt": receipt}
    seen = checkpoint_io.read(source, parts=())["images_seen"]
    return {"from": str(run), "checkpoint": source.name, "images_seen": seen, **known}


def network_hash(net: Backbone, config: Config) -> str:
    """Of the weights of a network, and of the options that make it of them."""
    options = {key: value for key, value in config["model"].items() if key not in NO_CHANGE}
    tensors = {**dict(net.named_parameters()), **dict(net.named_buffers())}  # `state_dict` would shard it
    return digest(tensors_hash(tensors), json.dumps(options, sort_keys=True))


def decoder_identity(tokenizer: Tokenizer, config: Config) -> dict[str, Any]:
    """What decodes, in the words of the protocol: its name, its precision, and the hash of its weights."""
    name, precision = build.name_of(config["tokenizer"]), config["tokenizer"].get("precision")
    network = getattr(tokenizer, "model", None)
    hashed = None if network is None else tensors_hash(network.state_dict())
    return {"name": name, "precision": precision, "hash": hashed}


def read_provenance(source: Path, images_hash: str) -> tuple[dict[str, Any], SamplingRecord, Any]:
    """Whose the images of a file or folder are, how they were made, and of which size, if their note is whole."""
    note = read_note(source) or {}
    record, subject = SamplingRecord.from_note(note.get("drawing")), note.get("subject")
    if not isinstance(subject, dict) or not {"from", "hash"} <= subject.keys() or record == SamplingRecord.unknown():
        if note:
            print(f"{source}: the protocol beside the images is not whole; their making is unknown", flush=True)
        return {"from": str(source), "hash": images_hash, "images": str(source)}, SamplingRecord.unknown(), None
    return {**subject, "images": str(source)}, record, note.get("size")


def sampling_record(request: Config, config: Config, pipeline: Pipeline) -> SamplingRecord:
    """How samples are made, in the words of the protocol; the pipeline is that of the run's `config`."""
    sampler = pipeline.sampler
    guidance = {key: value for key, value in config["guidance"].items() if key not in (TARGET, PARTIAL)}
    if pipeline.guide is not None:
        guidance["hash"] = tensors_hash(pipeline.guide.state_dict())
    return SamplingRecord(
        weights=request["weights"],
        sampler={"name": sampler.name, "steps": sampler.steps, **sampler.options},
        guidance=guidance,
        rope={key: value for key, value in request["rope"].items() if value is not None} or None,
        batch=request["batch"] if sampler.coupling == "batch" else None,
        labels=request["labels"],
        seed=request["seed"],
        precision=pipeline.precision,
        decoder=decoder_identity(pipeline.tokenizer, config),
        uint8=pipeline.uint8,
        versions=versions(*LIBRARIES),
    )
