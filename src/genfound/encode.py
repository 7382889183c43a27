"""`python -m genfound.encode data=... data.root=... tokenizer=... out=STORE`: images to latents; resumable."""

from __future__ import annotations

import os
import sys

from omegaconf import DictConfig

from genfound import command_line, launch, paths


def _task(cfg: DictConfig) -> None:
    import torch

    from genfound import build
    from genfound.checks import whole
    from genfound.encoding import encode, end_with_group, run_group

    end_with_group()
    launch.keep_freed_memory()
    config = paths.plain(cfg)
    rank, ranks, local = (int(os.environ.get(key, default)) for key, default in _PLACE.items())
    device = build.device(config["accelerator"])
    whole("devices", config["devices"], 1, or_null=True)
    wanted = config["devices"] or (torch.cuda.device_count() if device.type == "cuda" else 1)
    if ranks == 1 and wanted > 1:
        if not run_group([sys.executable, "-m", "genfound.encode", *sys.argv[1:]], wanted):
            raise command_line.JobError
        return
    encode(config, rank, ranks, build.device_of(config["accelerator"], local))


_PLACE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
"""What torchrun says of a process, also across machines."""


def main() -> None:
    """Console entry point."""
    command_line.entry(_task, "encode")


if __name__ == "__main__":
    main()
