"""What the jobs of a sweep are told by the command that starts them, and what they tell it.

Jobs may run in other processes or on other machines: what they are told is a key of Hydra's configuration, and they
write their failures to a file in the folder of the sweep.
"""

import os
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, read_write

KEY = "hydra.callbacks.swept"


class Swept(Callback):
    """Adds the keys that a sweep varies, and a file for why jobs failed, to the overrides of each of its jobs."""

    failed = False
    """Whether a job of the sweep that this process has started failed."""

    def __init__(self, keys: list[str], failures: str | None) -> None:
        self.keys, self.failures = keys, failures

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Look at the command line and at `hydra.sweeper.params`."""
        params = OmegaConf.select(config, "hydra.sweeper.params") or {}
        given = [*(f"{key}={value}" for key, value in params.items()), *config.hydra.overrides.task]
        parsed = OverridesParser.create().parse_overrides(given)
        keys = sorted({f"'{one.get_key_element().lstrip('+~')}'" for one in parsed if one.is_sweep_override()})
        self.failures = str(Path(config.hydra.sweep.dir).absolute() / f".failures-{os.getpid()}")
        Path(self.failures).unlink(missing_ok=True)  # of a command of before, with the same number, that was killed
        quoted = QuotedString(self.failures, Quote.single).with_quotes()
        with read_write(config.hydra):
            config.hydra.overrides.hydra += [f"{KEY}.keys=[{','.join(keys)}]", f"{KEY}.failures={quoted}"]

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Find whether a job failed."""
        assert self.failures
        Swept.failed = Path(self.failures).exists()
        Path(self.failures).unlink(missing_ok=True)


def note_failure(reason: str) -> None:
    """Tell the command that has started this job, if one has."""
    swept = HydraConfig.get().callbacks.get("swept")
    if swept and swept["failures"]:
        Path(swept["failures"]).parent.mkdir(parents=True, exist_ok=True)
        with Path(swept["failures"]).open("a") as file:
            file.write(f"{reason}\n")


def swept_keys() -> list[str]:
    """The keys that the sweep of this job varies, as they stand in its overrides; none outside a sweep."""
    swept = HydraConfig.get().callbacks.get("swept")
    return list(swept["keys"]) if swept else []
