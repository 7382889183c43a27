"""`python -m genfound.evaluate from=RUN|CHECKPOINT|NPZ|FOLDER reference=...`: figures with their protocol."""

from __future__ import annotations

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from genfound.config import command_line, compose
from genfound.runtime import processes, run_directory


def _task(cfg: DictConfig) -> None:
    from genfound.evaluation.evaluator import Asked, evaluate

    processes.keep_freed_memory()
    config = compose.plain(cfg)
    evaluate(Asked(config, command_line.chosen(), str(HydraConfig.get().runtime.choices["protocol"])))


def main() -> None:
    """Console entry point."""
    command_line.entry(_task, "evaluate", run_directory.read_config)


if __name__ == "__main__":
    main()
