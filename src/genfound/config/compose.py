"""The configuration as conf/ and overrides compose it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, ListConfig, OmegaConf

from genfound.config.checks import one_of

TARGET = "_target_"
"""The key that names a class to build."""

PARTIAL = "_partial_"
"""The key of what is called later, with more arguments."""

NEVER_OF_A_FILE = ("trainer", "strategy", "callbacks", "logger")
"""Groups that are built of a command's own composition alone, whatever their targets are."""


def config_dir() -> str:
    """Absolute path of conf/, in a checkout (or editable install) or inside an installed wheel."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "conf", package.parents[1] / "conf"):
        if (folder / "train.yaml").is_file():
            return str(folder)
    raise FileNotFoundError(f"conf/ is neither inside {package} nor beside its checkout; reinstall genfound")


def with_own_targets(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration that the command line composed, which trusts the code that it names outside genfound."""
    checked = {group: options for group, options in config.items() if group not in NEVER_OF_A_FILE}
    named = [path for _, path in targets_in(checked) if isinstance(path, str) and not path.startswith("genfound.")]
    return {**config, "trust": list(dict.fromkeys([*config.get("trust", ()), *named]))}


def targets_in(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every `_target_`, however deep in mappings and lists."""
    pairs = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, inner in pairs:
        if key == TARGET:
            yield f"{prefix}{key}", inner
        else:
            yield from targets_in(inner, f"{prefix}{key}.")


def read_yaml(file: Path) -> dict[str, Any]:
    """One file of conf/ alone, without what it inherits."""
    return to_dict(OmegaConf.load(file), resolve=False)


def option_names(group: str) -> list[str]:
    """The options of conf/<group>/, in alphabetical order."""
    return sorted(file.stem for file in (Path(config_dir()) / group).glob("*.yaml"))


def read_option(group: str, name: str) -> dict[str, Any]:
    """conf/<group>/<name>.yaml, without what it inherits."""
    file = Path(config_dir()) / group / f"{one_of(group, name, option_names(group))}.yaml"
    return {key: value for key, value in read_yaml(file).items() if key != "defaults"}


def fill_option(group: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """A sampler or guidance, what it does not say filled in from the option of its name; others' as they are."""
    name = given.get("name", "null")
    if TARGET in given and name not in option_names(group):
        return dict(given)
    options = read_option(group, name)
    if given.get(TARGET, options.get(TARGET)) != options.get(TARGET):
        raise ValueError(f"{group}.name={name} is another one than {given[TARGET]}; choose {group}={name}")
    if foreign := sorted(given.keys() - options.keys()):
        others = ", ".join(key for key in options if key not in ("name", TARGET, PARTIAL))
        raise ValueError(f"{group}.{foreign[0]} is not an option of {group}={name}; its options: {others or 'none'}")
    return {**options, **given}


def compose(name: str, overrides: Sequence[str]) -> dict[str, Any]:
    """conf/<name>.yaml with overrides, as the command line would compose it; missing values stay `???`."""
    begun = GlobalHydra.instance().is_initialized()
    with nullcontext() if begun else hydra.initialize_config_dir(config_dir(), version_base="1.3"):
        return to_dict(hydra.compose(name, list(overrides)))


def to_dict(cfg: DictConfig | ListConfig, resolve: bool = True) -> dict[str, Any]:
    """A composed configuration as dicts and lists, its interpolations resolved or as they are written."""
    container = OmegaConf.to_container(cfg, resolve=resolve)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def refuse_interpolations(config: Mapping[str, Any]) -> None:
    """Raise a ValueError for one in what a file holds: resolving it would read variables of the environment."""
    if "${" in repr(config):
        found = [f"{key}={value}" for key, value in flatten(config).items() if "${" in f"{key}={value!r}"]
        raise ValueError(f"{next(iter(found), 'it')} holds an interpolation; files hold values only")


def without_nulls(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with what is set alone, also in its groups."""
    values = {key: without_nulls(value) if isinstance(value, Mapping) else value for key, value in config.items()}
    return {key: value for key, value in values.items() if value is not None}


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings -> {dotted key: leaf}."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
