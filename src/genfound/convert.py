"""`python -m genfound.convert from=DiT-XL-2-256x256.pt to=out/`: official checkpoints to ours, and back."""

from pathlib import Path

from omegaconf import DictConfig

from genfound.config import command_line, compose


def _task(cfg: DictConfig) -> None:
    from genfound.checkpoints.convert import convert

    config = compose.to_dict(cfg)
    how = {key: config[key] for key in ("weights", "trust", "native")} | config["hints"]
    written = convert(Path(config["from"]), config["to"], config["format"], **how)
    for line in written.remarks:
        print(line)
    print(f"{written.tensors:,} tensors, {written.parameters:,} parameters: {written.file} ({written.format})")


def main() -> None:
    """Console entry point."""
    command_line.hydra_main(_task, "convert")


if __name__ == "__main__":
    main()
