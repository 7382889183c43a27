"""`python -m genfound.train model=... data=...`: train; the same command continues."""

from omegaconf import DictConfig

from genfound.config import command_line


def _task(cfg: DictConfig) -> str | None:
    from genfound.training import train

    return train(cfg)


def main() -> None:
    """Console entry point."""
    command_line.hydra_main(_task, "train")


if __name__ == "__main__":
    main()
