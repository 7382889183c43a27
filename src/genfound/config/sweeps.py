"""What the jobs of a sweep are told by the command that starts them, and what they tell it.

Jobs may run in other processes or on other machines: what they are told is a key of Hydra's configuration, and what
they tell is a line of JSON for each event, in a file in the folder of the sweep.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, read_write

from genfound.config.errors import USER_ERRORS, mistake, sentence
from genfound.config.signals import STOPPING, Received, Stopped

KEY = "hydra.callbacks.swept"

FILE = ".sweep-"
"""Followed by the number of the process that has started the sweep."""

DONE = ("done", "done before")
"""How a job ends that needs no further command."""


class Swept(Callback):
    """Adds the keys that a sweep varies, and the file of what its jobs tell, to the overrides of each of its jobs."""

    here: "Swept | None" = None
    """The sweep that this process has started."""

    def __init__(self, keys: list[str], notes: str | None) -> None:
        self.keys, self.notes, self.read = keys, notes, 0

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Look at the command line and at `hydra.sweeper.params`."""
        params = OmegaConf.select(config, "hydra.sweeper.params") or {}
        given = [*(f"{key}={value}" for key, value in params.items()), *config.hydra.overrides.task]
        parsed = OverridesParser.create().parse_overrides(given)
        self.keys = sorted({one.get_key_element().lstrip("+~") for one in parsed if one.is_sweep_override()})
        self.notes = str(Path(config.hydra.sweep.dir).absolute() / f"{FILE}{os.getpid()}")
        try:
            for file in (Path(self.notes), _stop_file(self.notes)):
                file.unlink(missing_ok=True)  # of a command of before, with the same number, that was killed
        except OSError:  # no such folder can be, as Hydra itself finds out
            return
        keys, quoted = ",".join(f"'{key}'" for key in self.keys), QuotedString(self.notes, Quote.single).with_quotes()
        with read_write(config.hydra):
            config.hydra.overrides.hydra += [f"{KEY}.keys=[{keys}]", f"{KEY}.notes={quoted}"]
        Swept.here = self

    def shown(self, job: Sequence[str]) -> str:
        """What tells a job from the others."""
        varied = [override for override in job if override.lstrip("+~").partition("=")[0] in self.keys]
        return " ".join(varied or job) or "default"


def swept_keys() -> list[str]:
    """The keys that the sweep of this job varies, as they stand in its overrides; none outside a sweep."""
    swept = HydraConfig.get().callbacks.get("swept")
    return list(swept["keys"]) if swept else []


def _notes() -> Path | None:
    """The file of the sweep of this job; None outside a sweep."""
    swept = HydraConfig.get().callbacks.get("swept")
    return Path(swept["notes"]) if swept and swept["notes"] else None


def _note(file: Path, job: Sequence[str], facts: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as out:
        out.write(json.dumps({"job": _own(job), **facts}) + "\n")


def _first_set(*keys: str | int, _root_: DictConfig) -> Any:
    """For `conf/hydra/launcher`, of commands with other keys: the value of the first key that is set, or the last."""
    *names, otherwise = keys
    values = (OmegaConf.select(_root_, str(name)) for name in names)
    return next((value for value in values if value is not None), otherwise)


OmegaConf.register_new_resolver("first_set", _first_set, replace=True)


def refuse_varied(launcher: DictConfig, name: str) -> None:
    """Raise a ValueError for a key that the sweep varies, and of which its launcher makes what it asks for all jobs."""
    asked = {
        key for inner in re.findall(r"\$\{([^}]*)\}", OmegaConf.to_yaml(launcher)) for key in re.split("[:,]", inner)
    }
    for key in Swept.here.keys if Swept.here else ():
        if key in asked:
            raise ValueError(
                f"hydra/launcher={name} asks for the same {key} for all jobs; give a sweep for each of them"
            )


def announce(jobs: Sequence[Sequence[str]]) -> None:
    """Note the jobs of a sweep before any begins."""
    if swept := Swept.here:
        for job in jobs:
            _note(Path(str(swept.notes)), job, {})
        swept.read = Path(str(swept.notes)).stat().st_size


def refuse(job: Sequence[str], reason: str) -> None:
    """A job that cannot begin has failed."""
    if swept := Swept.here:
        _note(Path(str(swept.notes)), job, {"ended": "failed", "seconds": 0, "reason": reason})
        print(f"[failed] {swept.shown(job)}  {reason}", flush=True)


ATTEMPTS = 2
"""Of a job, if the process of the launcher does not live to see its end."""


def left(jobs: Sequence[Sequence[str]], reason: str) -> list[Sequence[str]]:
    """The jobs to launch again, of those whose launcher has failed; others that have no end have failed with it."""
    swept = Swept.here
    assert swept and swept.notes
    notes = Path(swept.notes)
    told = {tuple(job): facts for job, facts in _told(notes)}
    allowed = ATTEMPTS if notes.stat().st_size > swept.read else 0  # where none has begun, none will
    unended = [job for job in jobs if "ended" not in told[tuple(_own(job))]]
    again = [job for job in unended if told[tuple(_own(job))].get("begun", 0) < allowed]
    for job in unended:
        if job not in again:
            refuse(job, reason)
    swept.read = notes.stat().st_size
    return again


def _own(job: Sequence[str]) -> list[str]:
    """The overrides of a job that are none of Hydra's."""
    return [override for override in job if not override.startswith("hydra.")]


def tell(**facts: Any) -> None:
    """From a job to the table of its sweep: folder, images, loss; nothing outside a sweep."""
    if notes := _notes():
        _note(notes, HydraConfig.get().overrides.task, facts)


def in_sweep() -> bool:
    """Whether this is a job of a sweep."""
    return _notes() is not None


def _stop_file(notes: str | Path) -> Path:
    """Holds the number of the signal that ends the sweep."""
    return Path(f"{notes}.stop")


def stop_signal() -> int:
    """From a job: the signal that the command of its sweep has got, if jobs are processes of a launcher; or 0."""
    notes = _notes()
    return int(_stop_file(notes).read_text() or 0) if notes and _stop_file(notes).exists() else 0


@contextlib.contextmanager
def stopping_jobs() -> Iterator[None]:
    """Let the jobs in the processes of a launcher end after a step, and no other begin, when a signal comes.

    They are waited for; a second signal ends this process at once.
    """
    assert Swept.here and Swept.here.notes
    file, received = _stop_file(Swept.here.notes), Received()

    def ask(number: int, _: Any) -> None:
        if not received.new(number):
            return
        if file.exists():
            raise SystemExit(128 + number)
        file.write_text(str(number))
        print("ending each job after a global step, with a checkpoint; once more ends at once", file=sys.stderr)

    before = {number: signal.signal(number, ask) for number in STOPPING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if file.exists():
        raise Stopped(int(file.read_text()))


def attempt(task: Callable[[], str | None]) -> None:
    """Run a job of a sweep; one line says how it ended, and only what ends the sweep is raised.

    The task may return another word for its end than `done`.
    """
    if Swept.here is None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the command, which asks this process to end
    if stop_signal():
        return
    begin, ended, reason = time.monotonic(), "failed", ""
    tell(begun=_facts().get("begun", 0) + 1, reason="")
    try:
        os.chdir(HydraConfig.get().runtime.cwd)  # workers of a cluster may have begun elsewhere
        ended = task() or "done"
    except USER_ERRORS as error:
        reason = sentence(error)
    except Exception as error:
        traceback.print_exc()
        reason = mistake(error)
    except BaseException:
        ended = "stopped"
        if not stop_signal():
            raise
    finally:
        seconds = time.monotonic() - begin
        tell(ended=ended, seconds=seconds, **({"reason": reason} if reason else {}))
        facts = _facts()
        name = facts.get("folder") or Swept(swept_keys(), None).shown(list(HydraConfig.get().overrides.task))
        if "folder" in facts or ended not in DONE:  # other commands than training say themselves what they have done
            print(f"[{ended}] {name}  {duration(seconds)}{_figures(facts)}  {reason}".rstrip(), flush=True)


def _facts() -> dict[str, Any]:
    """What this job has told."""
    notes, job = _notes(), list(HydraConfig.get().overrides.task)
    return next((facts for own, facts in _told(notes) if own == job), {}) if notes else {}


def _figures(facts: Mapping[str, Any]) -> str:
    return "".join(f"  {key} {facts[key]}" for key in ("images", "steps", "loss") if facts.get(key) is not None)


def duration(seconds: float) -> str:
    """Minutes and seconds."""
    return "{} min {} s".format(*divmod(round(seconds), 60))


def _told(notes: Path) -> list[tuple[list[str], dict[str, Any]]]:
    """The jobs of a sweep in their order, each with the last of all that it told."""
    found: dict[str, tuple[list[str], dict[str, Any]]] = {}
    for line in map(json.loads, notes.read_text().splitlines() if notes.is_file() else ()):
        job = line.pop("job")
        found.setdefault(json.dumps(job), (job, {}))[1].update(line)
    return list(found.values())


def finish() -> bool:
    """After a sweep that this process has started: print the table of its jobs, if any began; whether all are done."""
    swept = Swept.here
    if swept is None or swept.notes is None or not os.access(swept.notes, os.F_OK):  # also where no such folder can be
        return True
    jobs = _told(Path(swept.notes))
    for file in (Path(swept.notes), _stop_file(swept.notes)):
        file.unlink(missing_ok=True)
    _remove_empty(Path(swept.notes).parent)
    rows = [("job", "ended", "images", "loss", "time", "reason")]
    for job, facts in jobs:
        ended = facts.get("ended") or ("stopped" if "begun" in facts else "not begun")
        images, loss = (facts.get(key) for key in ("images", "loss"))
        shown = "" if images is None else f"{images:,}", "" if loss is None else f"{loss:.5g}"
        time_taken = duration(facts["seconds"]) if "seconds" in facts else ""
        rows.append((swept.shown(job), ended, *shown, time_taken, facts.get("reason", "")))
    undone = sum(row[1] not in DONE for row in rows[1:])
    if not any(facts for _, facts in jobs):  # the launcher has failed
        return not undone
    if undone or any("folder" in facts for _, facts in jobs):
        _print_table(rows)
    if undone:
        print(f"error: {undone} of {len(jobs)} jobs are not done; the same command goes on with them", file=sys.stderr)
    return not undone


def _remove_empty(folder: Path) -> None:
    """Remove what Hydra has written for a sweep whose command puts its results elsewhere."""
    if [path.name for path in folder.rglob("*") if not path.is_dir()] == ["multirun.yaml"]:
        shutil.rmtree(folder)
        above = folder.parent
        while Path.cwd() in above.parents and not any(above.iterdir()):
            above.rmdir()
            above = above.parent


def running(folder: Path) -> bool:
    """Whether a process of this machine is at work on a sweep with this folder."""
    for file in folder.glob(f"{FILE}*"):
        with contextlib.suppress(OSError, ValueError):
            os.kill(int(file.name.removeprefix(FILE)), 0)
            return True
    return False


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    """Columns in line, but for those of which only the title is there."""
    columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    for row in zip(*columns, strict=True) if len(rows) > 1 else ():
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip(), flush=True)
