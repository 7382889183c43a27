"""Which keys a sweep varies: found once when it starts, and handed to every job as a key of Hydra's configuration."""

from __future__ import annotations

from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, read_write

KEY = "hydra.callbacks.swept.keys"


class Swept(Callback):
    """Adds `hydra.callbacks.swept.keys=[...]` to the overrides that every job of a sweep is composed with.

    So it reaches jobs of any launcher, also those on other machines.

    Args:
        keys: filled in when a sweep starts.
    """

    def __init__(self, keys: list[str]) -> None:
        self.keys = keys

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Look at the command line and at `hydra.sweeper.params`."""
        params = OmegaConf.select(config, "hydra.sweeper.params") or {}
        given = [*(f"{key}={value}" for key, value in params.items()), *config.hydra.overrides.task]
        parsed = OverridesParser.create().parse_overrides(given)
        keys = sorted({f"'{one.get_key_element().lstrip('+~')}'" for one in parsed if one.is_sweep_override()})
        with read_write(config.hydra):
            config.hydra.overrides.hydra.append(f"{KEY}=[{','.join(keys)}]")


def swept_keys() -> list[str]:
    """The keys that the sweep of this job varies, as they stand in its overrides; none outside a sweep."""
    swept = HydraConfig.get().callbacks.get("swept")
    return list(swept["keys"]) if swept else []
