"""Weights & Biases: one run per run directory, continued by a resume, offline when nobody is logged in.

W&B takes no line back. A killed process has sent lines of steps that no checkpoint has, which the continued run makes
again, and W&B may have lost the last ones. So a run that goes on finds out which steps W&B has: lines of those are not
sent again, and earlier ones that it lacks are sent from metrics.jsonl. The best values of the summary are of the whole
run likewise, which W&B's own (`define_metric(summary="min")`) are not: they begin anew where a run goes on.
"""

import contextlib
import functools
import os
import shlex
import struct
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from genfound.loggers.base import RunLogger, Sample, improve
from genfound.loggers.json_lines import lines_of
from genfound.runtime.files import visible


def optional(method: Callable[..., None]) -> Callable[..., None]:
    """Training goes on without W&B: its first failure is said in a line, and is its end."""

    @functools.wraps(method)
    def attempt(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            if not self.stopped:
                method(self, *args, **kwargs)
        except Exception as error:
            self.stopped = True
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            text = f"Weights & Biases has stopped ({reason}); training goes on, with its curves in metrics.jsonl"
            print(text, flush=True)

    return attempt


class WandbLogger(RunLogger):
    """A W&B run whose steps are global steps, drawn over the number of images seen.

    Args:
        folder: run directory, runs/<study>/<name>; the id of the W&B run is kept in its wandb/ folder.
        anew: begin another W&B run, because this one has later lines, of another configuration.
    """

    def __init__(self, folder: Path, project: str, anew: bool = False) -> None:
        self.folder, self.project, self.anew, self.stopped = folder, project, anew, False
        self._config: dict[str, Any] = {}
        self._run: Any = None
        self._step, self._row, self._best = -1, dict[str, Any](), dict[str, float]()

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The configuration of the run, before its first metrics."""
        self._config |= params

    @property
    def experiment(self) -> Any:
        """The W&B run, which begins when it is first asked for; `None` where W&B has stopped."""
        if self._run is None:
            self._begin()
        return self._run

    @optional
    def _begin(self) -> None:
        """Begin, with the lines of metrics.jsonl that W&B lacks."""
        import wandb

        own = self.folder / "wandb"
        own.mkdir(parents=True, exist_ok=True)
        id_file = own / "run_id"
        if self.anew or not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:12])
        run = wandb.init(
            id=id_file.read_text(), resume="allow", project=self.project, group=self.folder.parent.name,
            name=self.folder.name, job_type="train", tags=tags(self._config), dir=self.folder, config=self._config,
            mode=mode(),
            settings=wandb.Settings(silent=True),
        )  # fmt: skip
        run.define_metric("images_seen")
        run.define_metric("*", step_metric="images_seen")
        self._sent = max(run.starting_step - 1, last_step(own, run.id))
        self._run = run
        for line in lines_of(self.folder / "metrics.jsonl"):
            self._add({key: value for key, value in line.items() if value is not None}, line.pop("step"))

    @optional
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Add numbers to the row of a step, which is sent when the next one begins."""
        assert step is not None
        self._add(metrics, step)

    def _add(self, values: Mapping[str, Any], step: int) -> None:
        if self.experiment is not None:
            if step != self._step:
                self._send()
            self._step = step
            self._row |= values
            if better := improve(self._best, values):
                self._run.summary.update(better)

    def _send(self) -> None:
        if self._row and self._step > self._sent:
            self._run.log(self._row, step=self._step, commit=True)
        self._row = {}

    def note(self, text: str, step: int) -> None:
        """Add a text to the row of its step."""
        self.log_metrics({"note": text}, step)

    @optional
    def picture(self, name: str, file: Path, images_seen: int, step: int, samples: Sequence[Sample] = ()) -> None:
        """Log a picture, and a table of its samples."""
        import wandb

        rows = [[wandb.Image(image), *about, images_seen] for image, *about in samples]
        table = {f"{name}_table": wandb.Table(columns=list(COLUMNS), data=rows)} if rows else {}
        self._add({name: wandb.Image(str(file)), **table, "images_seen": images_seen}, step)

    @optional
    def finalize(self, status: str) -> None:
        """Finish the W&B run; where it was offline, say how to send it."""
        if self._run is not None:
            self._send()
            self._run.finish()
            self.stopped = True
            if offline := visible(self.folder / "wandb", f"offline-run-*-{self._run.id}*"):
                print(f"for Weights & Biases, once logged in: wandb sync {shlex.join(map(str, offline))}", flush=True)


COLUMNS = ("picture", "class", "size", "seed", "images_seen")
"""Of a table of samples."""


def tags(config: Mapping[str, Any]) -> list[str]:
    """The family, data and objective of a run, and the options of them that were chosen; at most 64 letters each."""
    groups, chosen = ("model", "data", "objective"), config.get("options", {})
    classes = (config.get(group, {}).get("_target_", "").rpartition(".")[2] for group in groups)
    return [tag[:64] for tag in dict.fromkeys([*classes, *map(chosen.get, groups)]) if tag]


def last_step(folder: Path, run_id: str) -> int:
    """The last step in the offline directories of a W&B run, or -1."""
    from wandb.proto import wandb_internal_pb2

    message: Any = vars(wandb_internal_pb2)["Record"]
    files = [own / f"run-{run_id}.wandb" for own in visible(folder, f"offline-run-*-{run_id}*")]
    records = (message.FromString(data) for file in filter(Path.is_file, files) for data in stored_records(file))
    history = (record.history for record in records if record.WhichOneof("record_type") == "history")
    return max((line.step.num for line in history), default=-1)


BLOCK = 32_768
"""Bytes of a block of a .wandb file, which is a log of LevelDB: no piece of a record goes over its end."""

HEAD = struct.Struct("<IHB")
"""Before each piece: checksum, length, and whether it is all (1), the first (2), a middle (3), or the last (4) part."""


def stored_records(file: Path) -> Iterator[bytes]:
    """The records of a .wandb file that are whole, each a serialized protocol buffer."""
    data, record = file.read_bytes(), b""
    place = 7  # after the name of the format and its version
    while place + HEAD.size <= len(data):
        left = BLOCK - place % BLOCK
        if left < HEAD.size:
            place += left
            continue
        _, length, part = HEAD.unpack_from(data, place)
        place += HEAD.size + length
        if part == 0 or place > len(data):
            return
        record += data[place - length : place]
        if part in (1, 4):
            yield record
            record = b""


def mode() -> Any:
    """WANDB_MODE if set; otherwise online for who is logged in, offline (sync later) for who is not."""
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    import wandb

    with contextlib.suppress(wandb.Error):  # a key, but no way to the server
        if wandb.login(prompt=False):
            return "online"
    return "offline"
