"""Weights & Biases: one run per run directory, continued by a resume, offline when nobody is logged in."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Dashboard:
    """A W&B run whose horizontal axis is the number of images seen.

    Args:
        folder: run directory; the id of the W&B run is kept in its wandb/ folder.
        config: resolved configuration and provenance.
        project: W&B project.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], project: str) -> None:
        import wandb

        (folder / "wandb").mkdir(parents=True, exist_ok=True)
        id_file = folder / "wandb" / "run_id"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:12])
        self._wandb = wandb
        self._run = wandb.init(
            id=id_file.read_text(),
            resume="allow",
            project=project,
            group=str(config["study"]),
            name=folder.name,
            dir=folder,
            config=dict(config),
            mode=_mode(),
            settings=wandb.Settings(silent=True),
        )
        self._run.define_metric("images_seen")
        self._run.define_metric("*", step_metric="images_seen")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log numbers against images seen."""
        self._run.log(dict(metrics))

    def note(self, text: str, step: int) -> None:
        """Log a text."""
        self._run.log({"note": text})

    def picture(self, name: str, file: Path, images_seen: int) -> None:
        """Log a picture."""
        self._run.log({name: self._wandb.Image(str(file)), "images_seen": images_seen})

    def close(self) -> None:
        """Finish the W&B run."""
        self._run.finish()


def _mode() -> Any:
    """WANDB_MODE if set; otherwise online for who is logged in, offline (sync later) for who is not."""
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    import wandb

    try:
        return "online" if wandb.login(prompt=False) else "offline"
    except wandb.Error:  # a key, but no way to the server
        return "offline"
