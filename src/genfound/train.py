"""`python -m genfound.train model=... data=...`: train; the same command continues."""

from omegaconf import DictConfig

from genfound import command_line, launch


def _task(cfg: DictConfig) -> None:
    launch.train(cfg)


def main() -> None:
    """Console entry point."""
    command_line.entry(_task, "train")


if __name__ == "__main__":
    main()
