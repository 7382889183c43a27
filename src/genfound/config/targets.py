"""Which classes a configuration may name to be built, whose code they may be, and what Hydra builds of them.

A configuration out of a file chooses among the classes of genfound and of packages that the user trusts. What
the command line itself composes is trusted as it is; see `compose.with_own_targets`.
"""

import functools
import importlib
import inspect
import pkgutil
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import InstantiationException

from genfound.config.compose import PARTIAL, TARGET, fill_option, flatten, refuse_interpolations, targets_in

Config = Mapping[str, Any]

SAMPLER = "genfound.samplers.base.Sampler"
"""What functions become that are declared to be samplers."""

BASES = {
    "model": "genfound.backbones.base.Backbone",
    "objective": "genfound.objectives.base.Objective",
    "tokenizer": "genfound.tokenizers.base.Tokenizer",
    "data": "genfound.data.images.base.ImageSource",
    "layout": "genfound.layouts.base.Layout",
    "sampler": SAMPLER,
    "guidance": "genfound.samplers.guidance.Guidance",
    "alignment": "genfound.alignment.repa.Alignment",
    "alignment.teachers": "genfound.alignment.base.Teacher",
    "text_encoder": "genfound.text.base.TextEncoder",
}
"""Group of the configuration -> what its class must be, of a sampler its declaration; no other group of a file is built
from a target."""

GROUPS = ("model", "data", "tokenizer", "layout", "objective", "sampler", "guidance", "optimizer", "trainer")
"""What the configuration of any run has."""

LOADED = ("model", "objective", "tokenizer", "sampler", "guidance")
"""What is built of every model that is loaded, guidance if it has any; its data only where they are asked for."""

DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", re.ASCII)
PACKAGE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)


def trusted(config: Config) -> Sequence[str]:
    """The packages beside genfound whose classes a configuration may name."""
    return config.get("trust", ())


def from_file(config: Any, trust: Collection[str], file: Path) -> dict[str, Any]:
    """The configuration that a file holds, with the packages, or dotted names, that the user trusts, not with its own.

    What it may not build is refused before anything of that is imported.
    """
    names = [trust] if isinstance(trust, str) else list(trust)
    for name in names:
        if not (isinstance(name, str) and PACKAGE.fullmatch(name)):
            raise ValueError(f"trust: {name} is not the name of a package")
    require_groups(config, file)
    try:
        refuse_interpolations(config)
        config = {**config, **{group: fill_option(group, config[group]) for group in ("sampler", "guidance")}}
        for group in LOADED:
            if group != "guidance" or TARGET in config[group]:
                target(group, config[group], names)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return {**config, "trust": names}


def require_groups(config: Any, origin: Path) -> None:
    """Nothing, if this is the configuration of a run."""
    if missing := [group for group in GROUPS if not isinstance(config, Mapping) or group not in config]:
        raise ValueError(f"{origin} is not a run directory: its config.yaml has no {missing[0]}")
    if wrong := [group for group in GROUPS if not isinstance(config[group], Mapping)]:
        raise ValueError(f"{origin}: {wrong[0]}={config[wrong[0]]} must be a group of keys")


def target(group: str, options: Mapping[str, Any], trust: Sequence[str]) -> Any:
    """The class that `options["_target_"]` names, after all that are nested in the options were checked alike."""
    for key, path in targets_in(options, f"{group}."):
        if key != f"{group}.{TARGET}":
            _resolve(key, path, BASES.values(), trust)
    return _resolve(f"{group}.{TARGET}", options.get(TARGET), (BASES[group],), trust)


def resolved(group: str, options: Mapping[str, Any], trust: Sequence[str]) -> dict[str, Any]:
    """The options of a group with the class itself in the place of its name, checked; ready for Hydra."""
    refuse_interpolations({group: options})
    for key in flatten(options, f"{group}."):
        if key.rpartition(".")[2].startswith("_") and not key.endswith((f".{TARGET}", f"{group}.{PARTIAL}")):
            raise ValueError(f"{key} is no option of a class")
    return {**options, TARGET: target(group, options, trust)}


def _resolve(key: str, path: Any, bases: Collection[str], trust: Sequence[str]) -> Any:
    if not (isinstance(path, str) and DOTTED.fullmatch(path)):
        raise ValueError(f"{key}={path} must be the dotted name of a class")
    packages = ("genfound", *trust)
    if not _within(path, packages):
        raise ValueError(f"{key}={path} is code outside genfound; if you trust it, set trust=[{path.split('.')[0]}]")
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{key}={path} cannot be imported: {error}") from None
    if path in trust:
        return found
    kind, code = (type(found), getattr(found, "function", None)) if bases == (SAMPLER,) else (found, found)
    module = getattr(code, "__module__", "")
    if not isinstance(kind, type) or not _within(module, packages):
        what = "sampler" if code is not found else "class"
        raise ValueError(f"{key}={path} is not a {what} of {' or '.join(packages)}")
    inherited = {f"{base.__module__}.{base.__qualname__}" for base in kind.__mro__}
    if _within(module, ("genfound",)) and inherited.isdisjoint(bases):
        raise ValueError(f"{key}={path} is no {' or '.join(base.rpartition('.')[2] for base in bases)}")
    return found


def _within(path: str, packages: Sequence[str]) -> bool:
    """Whether a dotted name is one of these, or inside."""
    return any(path == package or path.startswith(f"{package}.") for package in packages)


def instantiate(group: str, options: Mapping[str, Any], trust: Sequence[str], **extra: Any) -> Any:
    """Build what the options of a group describe, after its targets were checked; see `resolved`."""
    return _call(group, resolved(group, options, trust), extra)


def partial(group: str, options: Mapping[str, Any], trust: Sequence[str]) -> functools.partial[Any]:
    """What the options of a group describe, to be called later with more arguments; see `instantiate`."""
    checked = {**resolved(group, options, trust), PARTIAL: True}
    bound: functools.partial[Any] = hydra.utils.instantiate(checked, _convert_="all")
    try:
        inspect.signature(bound.func).bind_partial(**bound.keywords)
    except TypeError as error:
        raise ValueError(f"{group}: {error}") from None
    return bound


def instantiate_own(key: str, options: Mapping[str, Any], given: Mapping[str, Any] | None = None) -> Any:
    """Build a part of the command's own composition, trusted as it is; of what is given it gets what it names."""
    try:
        found = pkgutil.resolve_name(options[TARGET])
    except (KeyError, ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{key} cannot be built: {'no ' if isinstance(error, KeyError) else ''}{error}") from None
    named = inspect.signature(found).parameters
    return _call(key, options, {name: value for name, value in (given or {}).items() if name in named})


def _call(key: str, options: Mapping[str, Any], extra: Mapping[str, Any]) -> Any:
    """What Hydra instantiates, with complaints about the arguments in a line."""
    try:
        bound = hydra.utils.instantiate({**options, PARTIAL: True}, _convert_="all")
        return bound(**extra)
    except (ImportError, InstantiationException) as error:
        raise ValueError(f"{key}: {error}") from None
    except TypeError as error:
        name = str(getattr(bound.func, "__name__", ""))
        if str(error).startswith((f"{name}.__init__()", f"{name}()")):
            raise ValueError(f"{key}: {error}") from None
        raise
