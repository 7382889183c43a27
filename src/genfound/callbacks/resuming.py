"""A run that goes on: whether its checkpoint fits its configuration, and the record of what was changed."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning import Callback, Trainer
from torch import nn

from genfound import build
from genfound.checkpoints.initialise import other_tables
from genfound.checkpoints.load import ALIGNMENT, NET
from genfound.config.compose import flatten
from genfound.loggers.base import note
from genfound.modules.base import GenerativeModule
from genfound.runtime import checkpoint_io, devices, run_directory

Changes = Mapping[str, tuple[Any, Any]]
"""Key -> what it was, and what it is now."""

IMAGES = "data.fingerprint"

MEANT_HERE = {"trainer.precision": "precision", "compile": "compile"}
"""Keys that may be auto -> the fact that says what that is on this machine."""

HISTORY = "changes.jsonl"
"""One line for each key that was changed: the step and images from which it counts, key, before, now."""


def facts(parts: build.RunComponents) -> dict[str, Any]:
    """What the configuration of a run does not say, because it is found out on the machine."""
    precision = devices.precision(parts.config["trainer"]["precision"], parts.device)
    return {
        "fingerprint": parts.images.fingerprint,
        "precision": "bf16" if precision == "bf16-mixed" else "fp32",
        "compile": devices.compiled(parts.config["compile"], parts.device),
    }


def changes(folder: Path, parts: build.RunComponents, state: Mapping[str, Any], file: Path) -> Changes:
    """What changes with a run that goes on from a checkpoint."""
    _check_network(folder, parts, state, file)
    changed, now = run_directory.changed(folder, parts.config), facts(parts)
    found = {key: pair for key, pair in changed.items() if run_directory.changes_numbers(key)}
    for key, name in ((IMAGES, "fingerprint"), *MEANT_HERE.items()):
        found.pop(key, None)
        before = state["run"].get(name, now[name])
        if before != now[name]:
            found[key] = (before, now[name])
    if parts.config["allow_changes"]:
        return found
    if IMAGES in found:
        way = "choose another name=..., or allow_changes=true to continue it on these"
        raise ValueError(f"data.root: these are not the images that {folder} was trained on; {way}")
    for key in MEANT_HERE.keys() & found.keys():
        before, here = (str(value).lower() for value in found[key])
        both = f"is {here} here, and {folder} was trained with {before}"
        way = f"set {key}={before}, or allow_changes=true"
        raise ValueError(f"{key}={flatten(parts.config)[key]} {both}; {way}")
    return found


def _check_network(folder: Path, parts: build.RunComponents, state: Mapping[str, Any], file: Path) -> None:
    saved = state["state_dict"].items()
    tensors = {key.removeprefix(NET): value for key, value in saved if key.startswith(NET)}
    aligned = {key.removeprefix(ALIGNMENT): value for key, value in saved if key.startswith(ALIGNMENT)}
    own, names = parts.net.state_dict(), parts.images.class_names
    if other_tables(own, tensors):
        classes = f"data.root has {len(names)} classes and {folder} was trained on {len(state['run']['class_names'])}"
        way = f"start another run from its weights, with name=... init_from={folder}"
        raise ValueError(f"{classes}: its label table does not fit; {way}")
    try:
        checkpoint_io.compare_keys(parts.net, tensors, file)
        checkpoint_io.compare_keys(parts.alignment or nn.Module(), aligned, file)
    except ValueError as error:
        raise ValueError(f"{error}; a run keeps its network: choose another name=...") from None


@dataclass
class Continuation(Callback):
    """Lets the configuration of a run be the one that it goes on with, once everything has been restored."""

    folder: Path
    made: Changes

    def on_train_start(self, trainer: Trainer, module: GenerativeModule) -> None:
        """Write the history, then the configuration; on rank 0, after every rank has read it."""
        if not trainer.is_global_zero:
            return
        at = {"step": trainer.global_step, "images_seen": module.images_seen}
        for key, (before, now) in self.made.items():
            with open(self.folder / HISTORY, "a") as out:
                out.write(json.dumps({**at, "key": key, "before": before, "now": now}) + "\n")
            what = f"{key} was {before} and is {now} from here on"
            if key == IMAGES:
                what = (
                    "these are other images than before: their order is drawn anew, so that images of the pass that "
                    "has begun may be repeated or left out; every later pass shows each image once"
                )
            note(trainer, f"changed at step {at['step']:,} ({at['images_seen']:,} images): {what}")
        run_directory.adopt(self.folder)
