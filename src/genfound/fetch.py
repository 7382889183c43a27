"""`python -m genfound.fetch model=... tokenizer=... to=FOLDER`: download weights, for machines without internet."""

from pathlib import Path

from omegaconf import DictConfig

from genfound.config import command_line, compose


def _task(cfg: DictConfig) -> None:
    from genfound.checkpoints.fetch import fetch

    groups = ("tokenizer", "alignment", "text_encoder")
    config = compose.with_own_targets({group: compose.to_dict(cfg[group]) for group in groups})
    print("\n".join(fetch(config, cfg.inception, cfg.to and Path(cfg.to).expanduser())))


def main() -> None:
    """Console entry point."""
    command_line.hydra_main(_task, "fetch")


if __name__ == "__main__":
    main()
