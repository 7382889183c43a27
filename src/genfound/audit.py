"""`python -m genfound.audit run=runs/default/first`: recomputes a part of a run and compares it with its receipt."""

from pathlib import Path

from omegaconf import DictConfig

from genfound.config import command_line, compose


def _task(cfg: DictConfig) -> None:
    from genfound.reporting.audit import audit

    config = compose.to_dict(cfg)
    audit(Path(config["run"]), config["window"], config["trust"])


def main() -> None:
    """Console entry point."""
    command_line.hydra_main(_task, "audit")


if __name__ == "__main__":
    main()
