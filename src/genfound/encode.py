"""`python -m genfound.encode data=... data.root=... tokenizer=... out=STORE`: images to latents; resumable."""

from omegaconf import DictConfig

from genfound import command_line, paths


def _task(cfg: DictConfig) -> None:
    from genfound.encoding import encode_on_devices

    encode_on_devices(paths.with_own_targets(paths.plain(cfg)))


def main() -> None:
    """Console entry point."""
    command_line.entry(_task, "encode")


if __name__ == "__main__":
    main()
