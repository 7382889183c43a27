"""`python -m genfound.fetch model=... tokenizer=... to=FOLDER`: download weights, for machines without internet."""

from pathlib import Path

from omegaconf import DictConfig

from genfound.config import command_line, compose


def _task(cfg: DictConfig) -> None:
    from genfound.checkpoints.fetch import fetch

    tokenizer, alignment = compose.to_dict(cfg.tokenizer), compose.to_dict(cfg.alignment)
    print("\n".join(fetch(tokenizer, alignment, cfg.inception, cfg.to and Path(cfg.to).expanduser())))


def main() -> None:
    """Console entry point."""
    command_line.hydra_main(_task, "fetch")


if __name__ == "__main__":
    main()
