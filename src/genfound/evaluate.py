"""`python -m genfound.evaluate from=RUN|CHECKPOINT|NPZ|FOLDER reference=...`: figures with their protocol."""

from __future__ import annotations

from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from genfound import launch


def _task(cfg: DictConfig) -> None:
    from genfound.evaluation import Asked, evaluate

    launch.keep_freed_memory()
    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    hydra_cfg = HydraConfig.get()
    evaluate(Asked(config, list(hydra_cfg.overrides.task), str(hydra_cfg.runtime.choices["protocol"])))


def main() -> None:
    """Console entry point."""
    launch.entry(_task, "evaluate")


if __name__ == "__main__":
    main()
