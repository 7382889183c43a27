"""Trained models, wherever they come from: a run, a file that `genfound.convert` wrote, or an official checkpoint."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from math import isqrt
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from genfound import build
from genfound.backbones.base import Backbone
from genfound.checkpoints import format_1, formats
from genfound.checkpoints.diffusers import read as diffusers_folder
from genfound.checkpoints.official import projectors
from genfound.checkpoints.official.families import FAMILIES, RELEASES, family_of, release_of
from genfound.checkpoints.official.ldm import FIRST_STAGE
from genfound.config import compose, targets
from genfound.objectives.base import Objective
from genfound.rng import Rng
from genfound.runtime import checkpoint_io, run_directory
from genfound.text.from_config import text_options
from genfound.tokenizers import Tokenizer

Config = dict[str, Any]
NET, ALIGNMENT = "net.", "alignment."
"""Names in a checkpoint begin with one of these; those of averages with the second or none."""

SIZE = ("width", "depth", "experts", "table")
"""Options that tell published sizes apart."""


@dataclass(frozen=True)
class LoadedModel:
    """A trained model, ready to sample."""

    net: Backbone  # in eval mode
    objective: Objective  # what it was trained for
    tokenizer: Tokenizer  # maps its latents to images; `Undecodable` where its weights are not to be had
    config: Config  # resolved configuration of the run, or that of the released model
    class_names: list[str]  # names of the labels
    sizes: list[tuple[int, int]]  # (height, width) in pixels that are typical of its training data


@dataclass(frozen=True)
class Weights:
    """Weights in our shapes, in the dtypes of the file, and what they belong to; see `LoadedModel`.

    `kept` are official tensors that our network does not have, such as projectors of an alignment, or computes itself
    with other rounding; `official` is the state dict of an official checkpoint.
    """

    config: Config
    state: Mapping[str, Tensor]
    class_names: list[str]
    sizes: list[tuple[int, int]]
    kept: Mapping[str, Tensor]
    official: Mapping[str, Tensor] | None = None


def load(path: str | Path, weights: str = "ema", trust: Collection[str] = (), **hints: Any) -> LoadedModel:
    """Load a trained model; no code that is not genfound's is imported for it, unless it is trusted.

    Args:
        path: a run `runs/<study>/<name>` (its newest checkpoint), a file in its checkpoints/, a file of
            `genfound.convert`, an official checkpoint (.pt, .pth, .bin, .safetensors, an accelerate folder), or a
            folder of diffusers, of which no code is run.
        weights: `ema` (the first decay) or `raw`.
        trust: packages beside genfound whose classes the configuration in a file may name.
        hints: what an official file does not tell, or `None`: `family` (DiT and SiT look alike, and so do FiTv2 and
            `fitv2_hr`), `num_heads` for a size that was never published, `tokenizer` (an option of that group, or a
            folder with its weights), and any other key of `model`. Of a run: `tokenizer`, and `text_encoder`, a folder
            with its weights.

    Raises:
        FileNotFoundError: nothing is there, or the run has no checkpoint.
        ValueError: a damaged file, one with code or that names some, one of another architecture, or an unknown hint.
    """
    found = find(Path(path), weights, trust, **hints)
    config = found.config
    tokenizer = build.tokenizer_if_there(config, Path(path))
    with torch.device("meta"):  # initial values would be drawn for nothing
        net = build.net(config, tokenizer.spec, len(found.class_names))
    if {name for name, _ in net.named_buffers()} - net.state_dict().keys():  # which no file holds
        net.materialise(Rng(config["seed"], "initialise"))
    checkpoint_io.load_strict(net, found.state, Path(path))
    return LoadedModel(net.eval(), build.objective(config), tokenizer, config, found.class_names, found.sizes)


def hints_of(config: Mapping[str, Any]) -> Config:
    """Hints for `load` in conf/sample.yaml and conf/evaluate.yaml, with where tokenizer and text encoder are now."""
    codec, text = config["hints"]["tokenizer"] or config["tokenizer"]["weights"], config["text_encoder"]["weights"]
    return {**config["hints"], "tokenizer": codec, "text_encoder": text}


def config_of(given: Mapping[str, Any]) -> Config:
    """The configuration of the model that {key: value} of overrides of conf/sample.yaml or conf/evaluate.yaml name."""
    told = {key.removeprefix("hints."): value for key, value in given.items() if key.startswith("hints.")}
    told.pop("tokenizer", None)
    path, known = Path(str(given["from"])), {key: value for key, value in told.items() if value is not None}
    if (ours := read_ours(path, None, given.get("trust", ()), values=False)) is not None:
        return ours.config
    return _released_config(open_official(path, "ema", known.pop("family", None)), known, path)[0]


def find(path: Path, weights: str, trust: Collection[str] = (), **hints: Any) -> Weights:
    """Read weights of any origin; see `load`."""
    hints = {key: value for key, value in hints.items() if value is not None}
    found = read_ours(path, weights, trust)
    if found is None:
        return _released(open_official(path, weights, hints.pop("family", None)), hints, path)
    codec, text = hints.pop("tokenizer", None), hints.pop("text_encoder", None)
    if hints:
        raise ValueError(f"{next(iter(hints))}: {path} tells all options itself")
    config = dict(found.config)
    if codec is not None:
        config["tokenizer"] = build.hinted_tokenizer(config["tokenizer"], codec)
    if text is not None:
        if not text_options(config):
            raise ValueError(f"text_encoder.weights={text}: {path} is a model of classes, which reads no captions")
        config["text_encoder"] = {**config["text_encoder"], "weights": text}
    return replace(found, config=config)


def read_ours(path: Path, weights: str | None, trust: Collection[str], values: bool = True) -> Weights | None:
    """Weights of a run or of a file of ours, `None` if it is something else; see `find`.

    Without `weights` they are averaged ones where there are any; without `values` those of a folder have only shapes.
    """
    if weights not in ("ema", "raw", None):
        raise ValueError(f"weights={weights} is unknown; choose ema or raw")
    folder = path if (path / "config.yaml").is_file() else path.parent.parent
    if (folder / "config.yaml").is_file() and (folder == path or path.suffix == ".ckpt"):
        return _of_run(folder, path, weights, trust, values)
    of_diffusers = diffusers_folder.folder(path)
    note = formats.ours(path) if of_diffusers is None else of_diffusers.note
    if note is None:
        return None
    version = _version(note, path)
    config = _checked(note.get("config"), version, trust, path)
    if of_diffusers is not None:
        return _of_folder(of_diffusers, note, config)
    tensors = checkpoint_io.read_safetensors(path)
    own = {key: value for key, value in tensors.items() if not key.startswith(formats.KEPT)}
    kept = {key.removeprefix(formats.KEPT): tensors[key] for key in tensors.keys() - own.keys()}
    own = own if version == formats.FORMAT else format_1.weights(own, config["model"])
    return Weights(config, own, note["class_names"], _pairs(note["sizes"]), kept)


def _of_folder(folder: diffusers_folder.Folder, note: Mapping[str, Any], config: Config) -> Weights:
    """Weights of a folder of diffusers that `genfound.convert` wrote."""
    family = config["model"]["_target_"].split(".")[-2]
    official = folder.state()
    folder.check(config["model"] | FAMILIES[family].options(official))
    if folder.vae is not None:
        config["tokenizer"] = build.hinted_tokenizer(config["tokenizer"], str(folder.vae))
    return Weights(config, FAMILIES[family].ours(official), note["class_names"], _pairs(note["sizes"]), {})


def _version(content: Mapping[str, Any], file: Path) -> int:
    """The format of what a file holds, which says so from the second on."""
    version = content.get("format", 1)
    if version not in (1, formats.FORMAT):
        raise ValueError(f"{file} is of format {version}, which a later genfound wrote; update genfound to read it")
    return int(version)


def _checked(config: Any, version: int, trust: Collection[str], file: Path) -> Config:
    """The configuration of a file of ours; which kernels run is no part of a model, so it is chosen here."""
    if version != formats.FORMAT and isinstance(config, Mapping):
        config = format_1.config(config)
    config = targets.from_file(config, trust, file)
    kernels = dict.fromkeys({"attention", "recurrence"} & config["model"].keys(), "auto")
    config.pop("format", None)
    return {**config, "model": {**config["model"], **kernels}}


def newest_checkpoint(path: Path) -> Path:
    """Of a run, which has another one later if it is still training; else the path."""
    if not (path / "config.yaml").is_file():
        return path
    file = checkpoint_io.newest(path / "checkpoints")
    if file is None:
        raise FileNotFoundError(f"{path} has no checkpoint yet")
    return file


def _of_run(folder: Path, path: Path, weights: str | None, trust: Collection[str], values: bool) -> Weights:
    saved = run_directory.read_config(folder)
    config = _checked(saved, _version(saved, folder), trust, folder / "config.yaml")
    file = newest_checkpoint(path)
    state = checkpoint_io.read(file, parts=())
    absent = [key for key in ("state_dict", "ema", "run") if key not in state]
    if absent:
        raise ValueError(f"{file} is no checkpoint of a run: it has no {absent[0]}")
    if weights == "ema" and not state["ema"]:
        raise ValueError(f"{folder} keeps no average of its weights (ema.decays=[]); set weights=raw")
    decay = None if weights == "raw" else next(iter(state["ema"]), None)
    average = {} if decay is None else state["ema"][decay]
    if values and file.is_dir():
        live = [key for key in state["state_dict"] if key.removeprefix(NET) not in average]
        state = checkpoint_io.read(file, parts=[*(f"state_dict.{key}" for key in live), f"ema.{decay}."])
        average = average and state["ema"][decay]
    tensors = {key.removeprefix(NET): value for key, value in state["state_dict"].items()}
    tensors |= average  # weights that are not trained have none
    aligned = {key: tensors.pop(key) for key in list(tensors) if key.startswith(ALIGNMENT)}
    family = str(config["model"][compose.TARGET]).split(".")[-2]
    kept = projectors.to_official({k.removeprefix(ALIGNMENT): v for k, v in aligned.items()}, family)
    if _version(state, file) != formats.FORMAT:
        tensors = format_1.weights(tensors, config["model"])
    names, sizes = list(state["run"]["class_names"]), _pairs(state["run"]["sizes"])
    return Weights(run_directory.located(config, folder), tensors, names, sizes, kept)


class Official(NamedTuple):
    """A state dict of a published family and release, where that is known, and the arguments of its training script."""

    family: str
    release: str | None
    state: Mapping[str, Tensor]
    args: Mapping[str, Any]
    folder: diffusers_folder.Folder | None = None  # of diffusers, that it is from


def open_official(path: Path, weights: str, family: str | None) -> Official:
    """Open an official checkpoint."""
    known = dict.fromkeys([*FAMILIES, *RELEASES])
    if family not in (None, *known):
        raise ValueError(f"family={family} is unknown; choose one of {', '.join(known)}")
    folder = diffusers_folder.folder(path)
    stored = formats.read(path) if folder is None else formats.CheckpointFile({"": folder.state()}, {})
    release = family or (None if folder is None else folder.family) or release_of(path, stored.args)
    try:
        name = family_of(next(iter(stored.states.values())), release)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    state = stored.choose(weights, path, FAMILIES[name].ema_first)
    state = FAMILIES[name].averaged(state) if weights == "ema" else state
    if folder is not None:
        folder.check(FAMILIES[name].options(state))
    return Official(name, release, state, stored.args, folder)


def _released(official: Official, hints: dict[str, Any], path: Path) -> Weights:
    config, names = _released_config(official, hints, path)
    side, state = _side(config, official.state), official.state
    return Weights(config, FAMILIES[official.family].ours(state), names, [(side, side)], {}, official=state)


def _released_config(official: Official, hints: dict[str, Any], path: Path) -> tuple[Config, list[str]]:
    """The configuration of a released model and the names of its classes; its weights are only looked at."""
    family, release, state, args, folder = official
    codec = hints.pop("tokenizer", None)
    if codec is None and folder is not None and folder.vae is not None:
        codec = str(folder.vae)
    if codec is None and any(name.startswith(FIRST_STAGE) for name in state):
        codec = str(path)
    told = {"heads" if key == "num_heads" else key: value for key, value in hints.items()}
    options = {**FAMILIES[family].options(state), **(folder.options() if folder else {}), **told}
    names = [str(number) for number in range(options.pop("num_classes"))]
    if folder is not None and folder.class_names is not None and len(folder.class_names) == len(names):
        names = folder.class_names
    config = _config(family, release, options, path)
    if codec is not None:
        config["tokenizer"] = build.hinted_tokenizer(config["tokenizer"], codec)
    config["objective"] |= FAMILIES[family].objective(state)
    for key in ("path_type", "prediction"):
        if key in args:
            config["objective"][key.removesuffix("_type")] = str(args[key]).lower()
    if "noise_scale" in args:
        config["objective"]["noise_scale"] = float(args["noise_scale"])
    return config, names


def _config(family: str, release: str | None, options: Mapping[str, Any], path: Path) -> Config:
    """The configuration of the released model of these options, with its quirks."""
    sizes = _presets(family).items()
    presets = [n for n, size in sizes if all(options[key] == size[key] for key in SIZE if key in size)]
    if any("_hr_" in name for name in presets) and release not in ("fitv2", "fitv2_hr"):
        way = "say hints.family=fitv2 or hints.family=fitv2_hr"
        raise ValueError(f"{path}: these weights fit FiTv2 and its fine-tuning to 512 pixels alike; {way}")
    preset = next((name for name in presets if ("_hr_" in name) == (release == "fitv2_hr")), family)
    released = "dit_moe_rf" if options.get("unused_half") and family == "dit_moe" else family
    if options.get("time") == "data0" and family == "sit":
        released = "sit_repa"
    if released == "dit_moe_rf" and preset == family:
        preset = "dit_moe_xl_8e2a"
    if preset == "dim_h_512":
        released = preset
    if family == "jit" and options["patch_size"] == 32:
        released = "jit_512"
    config = compose.compose("train", [f"experiment=official/{released}", f"model={preset}"])
    unknown = sorted(options.keys() - config["model"].keys())
    if unknown:
        raise ValueError(f"{unknown[0]} is not an option of model={family}; its options: {', '.join(config['model'])}")
    if config["model"].get("qk_norm") == "layernorm_half":
        options = {key: value for key, value in options.items() if key != "qk_norm"}  # released, in other words
    config["model"] |= options
    missing = [key for key, value in config["model"].items() if value == "???"]
    if missing:
        key = "num_heads" if missing[0] == "heads" else missing[0]
        raise ValueError(
            f"{path} is of no published size, and its shapes do not tell {missing[0]}; say hints.{key}=..."
        )
    return config


def _presets(family: str) -> dict[str, dict[str, Any]]:
    """Name -> what conf/model/<family>_<size>.yaml says of its size."""
    files = sorted((Path(compose.config_dir()) / "model").glob(f"{family}_*.yaml"))
    sizes = {file.stem: compose.read_yaml(file)["model"] for file in files}
    others = tuple(f"{name}_" for name, size in sizes.items() if compose.TARGET in size)  # dit_moe, nit_t2i
    fitting = {name: size for name, size in sizes.items() if "width" in size and not name.startswith(others)}
    return {name: size for name, size in fitting.items() if not name.endswith("_tiny")}


def _side(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> int:
    """Height and width in pixels: that of a position table, otherwise that of the data."""
    unit = config["model"]["patch_size"] * build.published_spec(config).stride
    if "table" in config["model"]:
        return int(config["model"]["table"][0] * unit)
    if "pos_embed" not in state:
        return int(config["data"]["size"])
    return int(isqrt(state["pos_embed"].shape[1]) * unit)


def _pairs(sizes: Any) -> list[tuple[int, int]]:
    return [(int(h), int(w)) for h, w in sizes]
