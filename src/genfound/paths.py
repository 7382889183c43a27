"""Where things lie: the configuration folder and the run directories.

A run directory `runs/<study>/<name>/` holds config.yaml, metrics.jsonl, checkpoints/, samples/, wandb/, and
DONE or FAILED. Its name is made of the overrides that identify the run, so the same command finds it again.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import AliasToken, YAMLError, scan

from genfound.writing import write_whole

NOT_IDENTITY = (
    "runs", "study", "name", "allow_changes", "trust", "trainer", "logger", "launcher",
    "data.root", "data.index", "data.num_workers", "tokenizer.weights",
)  # fmt: skip
"""Keys that may change between two calls of the same run."""

GROUPS = ("model", "data", "tokenizer", "layout", "objective", "sampler", "guidance", "optimizer", "trainer")
"""What the configuration of any run has."""

TARGET = "_target_"
"""The key that names a class to build."""

GRID = "grid.png"
"""Of `genfound.sample`, beside its images."""

LONGEST_NAME = 100


def config_dir() -> str:
    """Absolute path of conf/, in a checkout (or editable install) or inside an installed wheel."""
    package = Path(__file__).resolve().parent
    for folder in (package / "conf", package.parents[1] / "conf"):
        if (folder / "train.yaml").is_file():
            return str(folder)
    raise FileNotFoundError(f"conf/ is neither inside {package} nor beside its checkout; reinstall genfound")


def is_identity(key: str) -> bool:
    """Whether a config key, e.g. `model.depth`, is part of what a run is."""
    return not any(key == free or key.startswith(free + ".") for free in NOT_IDENTITY)


def run_name(overrides: Sequence[str]) -> str:
    """A file name from command-line overrides: `key-value` joined by `__`, hashed beyond 100 characters."""
    pairs = (override.lstrip("+~").partition("=") for override in overrides)
    parts = sorted(f"{key}-{value}" for key, _, value in pairs if is_identity(key))
    name = "__".join(re.sub(r"[^A-Za-z0-9._-]+", "_", part).strip("_") for part in parts) or "default"
    if len(name) > LONGEST_NAME:
        digest = hashlib.blake2b("__".join(parts).encode(), digest_size=6).hexdigest()
        name = f"{name[: LONGEST_NAME - 13]}-{digest}"
    return name


def run_dir(cfg: DictConfig, overrides: Sequence[str]) -> Path:
    """`runs/<study>/<name>`.

    Raises:
        ValueError: study or name is not a plain file name.
    """
    name = cfg.name or run_name(overrides)
    for key, value in (("study", cfg.study), ("name", name)):
        if not re.fullmatch(r"[A-Za-z0-9._-]+", str(value)) or set(str(value)) == {"."}:
            raise ValueError(f"{key}={value} must consist of letters, digits, dots, underscores and dashes")
    return Path(cfg.runs) / str(cfg.study) / str(name)


def claim(folder: Path, config: Mapping[str, Any], allow_changes: bool) -> None:
    """Write config.yaml into a run directory.

    Raises:
        ValueError: see `check_same`.
    """
    check_same(folder, config, allow_changes)
    text = OmegaConf.to_yaml(OmegaConf.create(dict(config)))
    write_whole(folder / "config.yaml", lambda temporary: temporary.write_text(text))


def check_same(folder: Path, config: Mapping[str, Any], allow_changes: bool) -> None:
    """Check that the run of a directory, if there is one, is this one.

    Raises:
        ValueError: a run with another configuration has been trained there; the message lists the keys.
    """
    if (folder / "config.yaml").exists() and any((folder / "checkpoints").glob("*.ckpt")) and not allow_changes:
        before, now = flatten(read_config(folder)), flatten(config)
        changed = [k for k in sorted(before.keys() | now.keys()) if is_identity(k) and before.get(k) != now.get(k)]
        if changed:
            listed = "; ".join(f"{k}: {before.get(k)} in the run, {now.get(k)} now" for k in changed[:5])
            raise ValueError(
                f"{folder} was trained with another configuration ({listed}); "
                "choose another name=..., or allow_changes=true to continue it changed"
            )


def read_config(folder: Path) -> dict[str, Any]:
    """The resolved configuration of a run.

    Raises:
        FileNotFoundError: the folder is not a run directory.
        ValueError: its config.yaml is damaged, or of something else.
    """
    file = folder / "config.yaml"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} is not a run directory: it has no config.yaml")
    try:
        if any(isinstance(token, AliasToken) for token in scan(file.read_text())):
            raise ValueError(f"{file} repeats parts of itself by name (YAML aliases), as no run writes")
        config = plain(OmegaConf.load(file), resolve=False)
    except (YAMLError, OmegaConfBaseException, AssertionError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: {error}") from None
    require_groups(config, folder)
    for text in _texts(config):
        if "${" in text:  # resolving it would read variables of the environment
            raise ValueError(f"{file} holds an interpolation ({text}); a run's configuration has values only")
    return config


def require_groups(config: Any, origin: Path) -> None:
    """Nothing, if this is the configuration of a run.

    Raises:
        ValueError: it is not.
    """
    missing = [group for group in GROUPS if not isinstance(config, Mapping) or group not in config]
    if missing:
        raise ValueError(f"{origin} is not a run directory: its config.yaml has no {missing[0]}")
    wrong = [group for group in GROUPS if not isinstance(config[group], Mapping)]
    if wrong:
        raise ValueError(f"{origin}: {wrong[0]}={config[wrong[0]]} must be a group of keys")


def config_hash(folder: Path) -> str:
    """Of the config.yaml of a run, byte by byte."""
    return hashlib.blake2b((folder / "config.yaml").read_bytes(), digest_size=16).hexdigest()


def with_own_targets(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration that the command line composed, which trusts the code that it names outside genfound."""
    named = [path for _, path in targets_in(config) if isinstance(path, str) and not path.startswith("genfound.")]
    return {**config, "trust": list(dict.fromkeys([*config.get("trust", ()), *named]))}


def targets_in(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every `_target_`, however deep in mappings and lists."""
    pairs = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, inner in pairs:
        if key == TARGET:
            yield f"{prefix}{key}", inner
        else:
            yield from targets_in(inner, f"{prefix}{key}.")


def _texts(value: Any) -> Iterator[str]:
    """Every text, however deep in mappings and lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(inner)


def read_yaml(file: Path) -> dict[str, Any]:
    """One file of conf/ alone, without what it inherits."""
    return plain(OmegaConf.load(file), resolve=False)


def option_names(group: str) -> list[str]:
    """The options of conf/<group>/, in alphabetical order."""
    return sorted(file.stem for file in (Path(config_dir()) / group).glob("*.yaml"))


def read_option(group: str, name: str) -> dict[str, Any]:
    """conf/<group>/<name>.yaml, without what it inherits.

    Raises:
        ValueError: there is no such option; the message lists them.
    """
    known = option_names(group)
    if name not in known:
        raise ValueError(f"{group}={name} is unknown; choose one of {', '.join(known)}")
    file = Path(config_dir()) / group / f"{name}.yaml"
    return {key: value for key, value in read_yaml(file).items() if key != "defaults"}


def compose(name: str, overrides: Sequence[str]) -> dict[str, Any]:
    """conf/<name>.yaml with overrides, as the command line would compose it; missing values stay `???`."""
    if GlobalHydra.instance().is_initialized():
        composed = hydra.compose(name, list(overrides))
    else:
        with hydra.initialize_config_dir(config_dir(), version_base="1.3"):
            composed = hydra.compose(name, list(overrides))
    return plain(composed)


def plain(cfg: DictConfig | ListConfig, resolve: bool = True) -> dict[str, Any]:
    """A composed configuration as dicts and lists, its interpolations resolved or as they are written."""
    container = OmegaConf.to_container(cfg, resolve=resolve)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings -> {dotted key: leaf}."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def mark_done(folder: Path, result: Mapping[str, Any]) -> None:
    """Record that a run reached its end, and where that was."""
    (folder / "FAILED").unlink(missing_ok=True)
    write_whole(folder / "DONE", lambda temporary: temporary.write_text(json.dumps(dict(result)) + "\n"))


def mark_failed(folder: Path, traceback: str) -> bool:
    """Record why a run stopped, unless another of its processes has; whether this one did."""
    (folder / "DONE").unlink(missing_ok=True)
    try:
        with open(folder / "FAILED", "x") as out:
            out.write(traceback)
    except FileExistsError:
        return False
    return True


def finished(folder: Path) -> dict[str, Any] | None:
    """What `mark_done` recorded, or None."""
    file = folder / "DONE"
    return json.loads(file.read_text()) if file.exists() else None
