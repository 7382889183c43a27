"""`python -m genfound.encode data=... data.root=... tokenizer=... out=STORE`: images to latents; resumable."""

from omegaconf import DictConfig

from genfound.config import command_line, compose


def _task(cfg: DictConfig) -> None:
    from genfound.encoding.encode import encode_on_devices

    encode_on_devices(compose.with_own_targets(compose.to_dict(cfg)))


def main() -> None:
    """Console entry point."""
    command_line.hydra_main(_task, "encode")


if __name__ == "__main__":
    main()
