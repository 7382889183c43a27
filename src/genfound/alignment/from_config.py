"""From a resolved configuration to an alignment and its teachers."""

import functools
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from genfound.alignment.base import Teacher, TeacherFeatures
from genfound.alignment.repa import Alignment
from genfound.alignment.stored import stored_names
from genfound.backbones.base import Backbone
from genfound.config import targets
from genfound.config.compose import TARGET
from genfound.config.targets import instantiate, trusted
from genfound.data.images.base import ImageSource
from genfound.rng import Rng

Config = Mapping[str, Any]

OF_TEACHERS = ("normalise", "zscore_alpha", "every", "until", "pixels")
"""Options of `TeacherFeatures`; the others are of `Alignment`."""


def alignment(config: Config, backbone: Backbone) -> Alignment | None:
    """The alignment of a configuration with its projectors, initialised from the seed; on `meta` without values."""
    options, named = dict(config.get("alignment") or {}), named_teachers(config)
    if not named:
        return None
    if absent := [key for key in OF_TEACHERS if key not in options]:
        raise ValueError(f"alignment has no {absent[0]}; let its yaml begin with defaults: [repa, _self_]")
    options = {key: value for key, value in options.items() if key not in (*OF_TEACHERS, "teachers", "features")}
    width, blocks = config["model"].get("width"), len(getattr(backbone, "blocks", ()))
    if width is None or not blocks:
        missing = "model.width" if width is None else "`blocks`"
        raise ValueError(f"alignment: {type(backbone).__name__} has no {missing}; choose alignment=none")
    if not backbone.passes_tokens:
        text = "have feature maps, not tokens; choose alignment=none"
        raise ValueError(f"alignment: the blocks of {type(backbone).__name__} {text}")
    with torch.device("meta"):
        built: Alignment = instantiate("alignment", options, trusted(config), width=width, widths=widths(config))
    if built.depth > blocks:
        raise ValueError(f"alignment.depth={built.depth} is the number of a block, and model.depth={blocks}")
    if torch.get_default_device().type != "meta":
        built.to_empty(device=torch.get_default_device())
        built.initialise(Rng(config["seed"], "initialise", "alignment"))
    return built


def fetch_teachers(config: Config, download: bool = True) -> dict[str, Path]:
    """Name -> the weights of each teacher that is needed and needs some, downloaded if they are not at hand."""
    found, named = dict[str, Path](), named_teachers(config)
    for name, options in {} if stored_names(config, named) else named.items():
        kind = targets.target("alignment.teachers", options, trusted(config))
        if not (isinstance(kind, type) and issubclass(kind, Teacher)):
            raise ValueError(
                f"alignment.teachers.{name}.{TARGET}={options[TARGET]} is no Teacher of genfound.alignment"
            )
        try:
            path = kind.fetch(options.get("weights"), download)
        except FileNotFoundError as error:
            reason = f"{error}".replace("alignment.teachers weights", f"alignment.teachers.{name}.weights")
            way = "alignment=none trains without a teacher, which is another system than the published one"
            raise FileNotFoundError(f"{reason}; {way}") from None
        if path is not None:
            found[name] = path
    return found


def load_teacher(
    options: Config, trust: Sequence[str], images: ImageSource | None = None, runs: str = "runs"
) -> Teacher:
    """A teacher of the width in its options, given what its constructor names of that, the images and the runs."""
    named = inspect.signature(targets.target("alignment.teachers", options, trust)).parameters
    known = {"images": images, "runs": runs, "width": options["width"]}
    own = {key: value for key, value in options.items() if key != "width"}
    given = {key: value for key, value in known.items() if key in named}
    built: Teacher = instantiate("alignment.teachers", own, trust, **given)
    if (width := getattr(built, "width", None)) != options["width"]:
        way = f"{type(built).__name__} has {width}, the channels of its features"
        raise ValueError(f"alignment.teachers: width={options['width']}, but {way}; set it so")
    return built


def widths(config: Config) -> dict[str, int]:
    """The channels of the features of each teacher."""
    return {name: own["width"] for name, own in named_teachers(config).items()}


def named_teachers(config: Config) -> dict[str, Any]:
    """The options of each teacher, by name."""
    every = (config.get("alignment") or {}).get("teachers") or {}
    if not isinstance(every, Mapping):
        raise ValueError(f"alignment.teachers={every} must be teachers by their names")
    named = {name: options for name, options in every.items() if options is not None}
    for name, options in named.items():
        if not isinstance(options, Mapping):
            way = "must be a teacher: _target_, width, and what else it needs; or null"
            raise ValueError(f"alignment.teachers.{name}={options} {way}")
        for key, what in {TARGET: "class", "width": "channels of its features"}.items():
            if key not in options:
                raise ValueError(f"alignment.teachers.{name} has no {key}; set it to the {what}")
    return named


def teachers(config: Config, images: ImageSource | None = None) -> TeacherFeatures | None:
    """The teachers of a configuration, which are loaded when they are first asked; with the images to learn from."""
    trust, named = trusted(config), named_teachers(config)
    if not named:
        return None
    stored = stored_names(config, named)
    loaders = {name: functools.partial(load_teacher, own, trust, images, config["runs"]) for name, own in named.items()}
    return TeacherFeatures(loaders, stored=stored, **{key: config["alignment"][key] for key in OF_TEACHERS})
