"""`python -m genfound.evaluate from=RUN|CHECKPOINT|NPZ|FOLDER reference=...`: figures with their protocol."""

from __future__ import annotations

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from genfound import command_line, launch, paths


def _task(cfg: DictConfig) -> None:
    from genfound.evaluation import Asked, evaluate

    launch.keep_freed_memory()
    config = paths.plain(cfg)
    evaluate(Asked(config, command_line.chosen(), str(HydraConfig.get().runtime.choices["protocol"])))


def main() -> None:
    """Console entry point."""
    command_line.entry(_task, "evaluate")


if __name__ == "__main__":
    main()
