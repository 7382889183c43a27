"""`python -m genfound.doctor`: what a machine has for a training, and what is wrong with it, on one screen."""

import os
import tempfile

from omegaconf import DictConfig

from genfound.config import command_line, compose


def _task(cfg: DictConfig) -> None:
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from genfound.config.options import check

    if HydraConfig.get().mode == RunMode.MULTIRUN:
        raise ValueError("genfound.doctor examines one configuration; leave out -m")
    config = compose.with_own_targets(compose.to_dict(cfg))
    check(config)
    with tempfile.TemporaryDirectory(prefix="genfound-", ignore_cleanup_errors=True) as folder:
        caches = ("TMPDIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
        os.environ.update(dict.fromkeys(caches, folder), TORCHINDUCTOR_COMPILE_THREADS="1")
        tempfile.tempdir = folder  # before torch is imported, which looks once
        from genfound.reporting.machine import examine, show

        if any(finding.status == "problem" for finding in show(examine(config))):
            raise SystemExit(1)


def main() -> None:
    """Console entry point."""
    command_line.hydra_main(_task, "train", may_lack=("data.root",))


if __name__ == "__main__":
    main()
