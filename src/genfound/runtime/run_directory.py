"""Where things lie: the configuration folder and the run directories.

A run directory `runs/<study>/<name>/` holds config.yaml, overrides.json, options.json, provenance.jsonl, metrics.jsonl,
log.txt (of a sweep's jobs), checkpoints/, samples/, wandb/, and DONE, STOPPED or FAILED. Its name is made of the
overrides that identify the run, so the same command finds it again.
A run that is continued under another configuration has that one in config.next.yaml until everything fits.
"""

import json
import re
import signal
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import AliasToken, YAMLError, scan

from genfound.config.compose import flatten, refuse_interpolations, to_dict
from genfound.config.targets import require_groups
from genfound.runtime.files import atomic_write, digest, visible

NOT_IDENTITY = (
    "runs", "study", "name", "allow_changes", "trust", "trainer", "strategy", "callbacks", "logger", "compile",
    "rdzv", "data.root", "data.image_root", "data.index", "data.num_workers", "tokenizer.weights",
    "text_encoder.weights",
)  # fmt: skip
"""Keys that are no part of the name of a run, unless a sweep varies them."""

IDENTITY = ("trainer.overfit_batches",)
"""Those that are, though their group is not."""

RECORDED = ("trainer.precision", "trainer.deterministic", "compile", "strategy.reduce_dtype")
"""Those that are not, and change numbers: another value does not continue a run silently."""

PLACE = ("runs", "study", "name")
"""Keys that are the path of a run."""

NEXT = "config.next.yaml"
OVERRIDES = "overrides.json"

OPTIONS = "options.json"
LOG = "log.txt"

FORMAT = 2
"""Of config.yaml, checkpoints and files of weights, all of which say so."""

PLACES = (
    ("data", "root"), ("data", "image_root"), ("data", "index"), ("tokenizer", "weights"), ("guidance", "weights"),
    ("text_encoder", "weights"),
)  # fmt: skip
"""Keys of a run that are paths, by group."""

LONGEST_NAME = 100


def is_identity(key: str) -> bool:
    """Whether a config key, e.g. `model.depth`, is part of what a run is."""
    return key in IDENTITY or not any(key == free or key.startswith(free + ".") for free in NOT_IDENTITY)


def changes_numbers(key: str) -> bool:
    """Whether a run with another value of a config key is another run."""
    return is_identity(key) or key in RECORDED


def run_name(overrides: Sequence[str], swept: Collection[str] = ()) -> str:
    """A file name from overrides: `key-value` of those that identify a run or are swept, joined by `__`.

    It is hashed beyond 100 characters, with what a sweep varies first, and so are values of swept keys that read alike
    as file names.
    """
    split = (override.lstrip("+~").partition("=") for override in overrides)
    pairs = [(key, value) for key, _, value in split if is_identity(key) or key in {*swept} - {*PLACE}]
    named = sorted(pairs, key="-".join)
    name = "__".join(_part(key, value, key in swept) for key, value in named) or "default"
    if len(name) > LONGEST_NAME:
        told = sorted(named, key=lambda pair: pair[0] not in swept)
        name = "__".join(_part(key, value, key in swept) for key, value in told)
        name = f"{name[: LONGEST_NAME - 13]}-{digest('__'.join(f'{key}-{value}' for key, value in named), size=6)}"
    return name


def _part(key: str, value: str, exact: bool) -> str:
    written = f"{key}-{value}"
    part = re.sub(r"[^A-Za-z0-9._-]+", "_", written).strip("_")
    return f"{part}-{digest(written, size=3)}" if exact and part != written else part


def run_dir(cfg: DictConfig, overrides: Sequence[str], swept: Collection[str] = ()) -> Path:
    """`runs/<study>/<name>`; a chosen name is followed by what a sweep varies."""
    name = str(cfg.name or run_name(overrides, swept))
    varied = [override for override in overrides if override.lstrip("+~").partition("=")[0] in {*swept} - {*PLACE}]
    if cfg.name and varied:
        name += f"__{run_name(varied, swept)}"
    for key, value in (("study", cfg.study), ("name", name)):
        check_name(key, value)
    return Path(cfg.runs) / str(cfg.study) / name


def check_name(key: str, value: Any) -> None:
    """Raise a ValueError for what is no name of a study or a run."""
    if not isinstance(value, str | int) or not re.fullmatch(r"[A-Za-z0-9._-]+", str(value)) or set(str(value)) == {"."}:
        raise ValueError(f"{key}={value} must consist of letters, digits, dots, underscores and dashes")


def write_config(folder: Path, config: Mapping[str, Any], allow_changes: bool) -> None:
    """Write the configuration into a run directory; where a run has been trained, for `adopt` to take over."""
    refuse_changes(folder, config, allow_changes)
    (folder / NEXT).unlink(missing_ok=True)
    file = folder / (NEXT if changed(folder, config) else "config.yaml")
    atomic_write(file, lambda temporary: temporary.write_text(_yaml(config)))


def note_overrides(folder: Path, overrides: Sequence[str]) -> None:
    """Keep what was set on the command line, for reports; the file is as old as the first command that set it."""
    _note(folder / OVERRIDES, list(overrides))


def note_options(folder: Path, options: Mapping[str, Any]) -> None:
    """Keep the option of each group of the configuration, chosen or by default, for loggers."""
    _note(folder / OPTIONS, {group: option for group, option in options.items() if "/" not in group and option})


def options_of(folder: Path) -> dict[str, Any]:
    """{group: option} as `note_options` kept it; nothing of runs of before."""
    return dict(_noted(folder / OPTIONS, dict) or {})


def _noted(file: Path, kind: type) -> Any:
    """What a file of JSON holds; None if it is not there.

    Raises:
        ValueError: it is damaged.
    """
    try:
        value = json.loads(file.read_text()) if file.is_file() else None
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"it holds no {kind.__name__}")
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}; remove it") from None
    return value


def _note(file: Path, value: Any) -> None:
    text = json.dumps(value) + "\n"
    if not file.is_file() or file.read_text() != text:
        atomic_write(file, lambda temporary: temporary.write_text(text))


def overrides_of(folder: Path) -> list[str]:
    """What `note_overrides` kept; nothing of runs of before."""
    return [str(override) for override in _noted(folder / OVERRIDES, list) or ()]


def given(folder: Path) -> dict[str, str]:
    """{dotted key or group: value} of the overrides that were kept."""
    pairs = (override.lstrip("+~").partition("=") for override in overrides_of(folder))
    return {key: value for key, _, value in pairs}


def _yaml(config: Mapping[str, Any]) -> str:
    return OmegaConf.to_yaml(OmegaConf.create({**config, "format": FORMAT}))


def claimed(folder: Path) -> dict[str, Any]:
    """The configuration that a run directory was claimed with."""
    return read_config(folder, _claimed_file(folder).name)


def _claimed_file(folder: Path) -> Path:
    return folder / (NEXT if (folder / NEXT).is_file() else "config.yaml")


def adopt(folder: Path) -> None:
    """The run goes on as it was claimed."""
    if (folder / NEXT).is_file():
        (folder / NEXT).replace(folder / "config.yaml")


def refuse_changes(folder: Path, config: Mapping[str, Any], allow_changes: bool) -> None:
    """Check that the run of a directory, if there is one, is this one."""
    others = {key: values for key, values in changed(folder, config).items() if changes_numbers(key)}
    for key in RECORDED:
        if "auto" in others.get(key, ()):  # compared when it is known what it means here
            del others[key]
    if others and not allow_changes:
        listed = "; ".join(f"{k}: {before} in the run, {now} now" for k, (before, now) in list(others.items())[:5])
        raise ValueError(
            f"{folder} was trained with another configuration ({listed}); "
            "choose another name=..., or allow_changes=true to continue it changed"
        )


def changed(folder: Path, config: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Key -> its values in the run that has been trained in a directory, if there is one, and in a configuration."""
    trained = (folder / "DONE").exists() or visible(folder / "checkpoints", "*.ckpt")
    if not trained or not (folder / "config.yaml").exists():
        return {}
    before, now = flatten(read_config(folder)), {**flatten(config), "format": FORMAT}
    if before.get("format") != FORMAT:
        raise ValueError(
            f"{folder} was trained by another version of genfound, which can be loaded but not continued; choose "
            f"another name=... (init_from={folder} begins with its weights)"
        )
    pairs = {key: (before.get(key), now.get(key)) for key in sorted(before.keys() | now.keys())}
    return {key: (old, new) for key, (old, new) in pairs.items() if old != new}


def read_config(folder: Path, name: str = "config.yaml") -> dict[str, Any]:
    """The resolved configuration of a run."""
    file = folder / name
    if not file.is_file():
        raise FileNotFoundError(f"{folder} is not a run directory: it has no config.yaml")
    try:
        if any(isinstance(token, AliasToken) for token in scan(file.read_text())):
            raise ValueError(f"{file} repeats parts of itself by name (YAML aliases), as no run writes")
        config = to_dict(OmegaConf.load(file), resolve=False)
    except (YAMLError, OmegaConfBaseException, AssertionError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: {str(error) or 'it holds no settings'}") from None
    require_groups(config, folder)
    try:
        refuse_interpolations(config)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return config


def located(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The configuration of a run; its relative paths lead where they did in training, if the run has not moved."""
    runs, run = Path(config.get("runs", "")), folder.resolve()
    origin = run.parents[min(len(runs.parts) + 1, len(run.parents) - 1)]
    if origin == Path.cwd() or origin / runs / str(config.get("study")) != run.parent:
        return dict(config)
    found = {group: dict(config[group]) for group in {group for group, _ in PLACES} if config.get(group)}
    for group, key in PLACES:
        value = found.get(group, {}).get(key)
        if isinstance(value, str) and (origin / value).exists():
            found[group][key] = str(origin / value)
    return {**config, **found}


def config_hash(config: Mapping[str, Any]) -> str:
    """Of a configuration as `write_config` writes it."""
    return digest(_yaml(config), size=16)


def claimed_hash(folder: Path) -> str:
    """Of the file of `claimed`, byte by byte; of no text if there is none."""
    file = _claimed_file(folder)
    return digest(file.read_bytes() if file.is_file() else "", size=16)


def mark_done(folder: Path, result: Mapping[str, Any]) -> None:
    """Record that a run reached its end, and where that was."""
    unmark(folder)
    atomic_write(folder / "DONE", lambda temporary: temporary.write_text(json.dumps(dict(result)) + "\n"))


def unmark(folder: Path) -> None:
    """The run goes on: it is neither stopped nor failed."""
    for mark in ("FAILED", "STOPPED"):
        (folder / mark).unlink(missing_ok=True)


def mark_stopped(folder: Path, number: int, where: str) -> None:
    """Record the signal that ended a run, unless it has failed before, and where that was."""
    (folder / NEXT).unlink(missing_ok=True)
    if not (folder / "FAILED").exists():
        text = json.dumps({"signal": number, "reason": f"{signal.Signals(number).name}: {where}"})
        atomic_write(folder / "STOPPED", lambda temporary: temporary.write_text(f"{text}\n"))


def stopped(folder: Path) -> dict[str, Any] | None:
    """`signal` and `reason` of `mark_stopped`, or None."""
    found: dict[str, Any] | None = _noted(folder / "STOPPED", dict)
    return found


def mark_failed(folder: Path, traceback: str) -> bool:
    """Record why a run failed, unless another of its processes has; whether this one did."""
    for mark in ("DONE", "STOPPED"):
        (folder / mark).unlink(missing_ok=True)
    (folder / NEXT).unlink(missing_ok=True)
    try:
        with open(folder / "FAILED", "x") as out:
            out.write(traceback)
    except OSError as error:  # it may also be a full disk, which may be why the run stopped
        return not isinstance(error, FileExistsError)
    return True


def finished(folder: Path) -> dict[str, Any] | None:
    """What `mark_done` recorded, or None."""
    found: dict[str, Any] | None = _noted(folder / "DONE", dict)
    return found
