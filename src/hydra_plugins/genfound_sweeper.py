"""Hydra finds its plugins in this namespace: the sweeper of genfound, which loses no job to another one."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import BrokenExecutor
from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from omegaconf.errors import OmegaConfBaseException

from genfound.config import compose, sweeps
from genfound.config.errors import sentence


class Sweeper(BasicSweeper):
    """Hydra's own, in which a job that cannot be composed is a failed one, and the others are launched."""

    def setup(self, **given: Any) -> None:
        """Put the launcher that was chosen behind one that it cannot fail."""
        super().setup(**given)
        assert self.launcher is not None
        self.launcher = Jobs(self.launcher)
        self.launcher.setup(**given)

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """`Jobs` does that, for each job alone."""


class Jobs(Launcher):
    """Has another launcher start the jobs that can be composed, whatever becomes of its processes."""

    def __init__(self, launcher: Launcher) -> None:
        self.launcher = launcher

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        """Keep what composes a job."""
        self.loader, self.config = hydra_context.config_loader, config
        sweeps.refuse_varied(config.hydra.launcher, config.hydra.runtime.choices["hydra/launcher"])

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Say which jobs there are, and launch them; again, once, those whose worker a signal has ended.

        A pool of processes gives up all of its jobs then, of which it cannot tell which one that was.
        """
        sweeps.announce(job_overrides)
        jobs = [job for job in job_overrides if self._composable(job)]
        in_this_process = isinstance(self.launcher, BasicLauncher)
        while jobs:
            with (
                _engine(self.launcher) as lost,
                contextlib.nullcontext() if in_this_process else sweeps.stopping_jobs(),
            ):
                try:
                    return self.launcher.launch(jobs, initial_job_idx)
                except lost as error:
                    jobs = sweeps.left(jobs, f"a worker of the launcher has ended: {sentence(error)}")
                except RuntimeError as error:  # of submitit, which repeats what sbatch has printed
                    raise ValueError(f"{type(self.launcher).__name__}: {str(error).strip().splitlines()[0]}") from error
        return []

    def _composable(self, job: Sequence[str]) -> bool:
        from genfound.config.command_line import composition_error

        try:
            self.loader.load_sweep_config(self.config, list(job))
        except (HydraException, OmegaConfBaseException) as error:
            sweeps.refuse(job, composition_error(error, self.config.hydra.job.config_name, job))
            return False
        return True


@contextlib.contextmanager
def _engine(launcher: Launcher) -> Iterator[type[Exception]]:
    """What a launcher raises if one of its workers has been killed; Ray is started and ended here.

    Its launcher would give a cluster options that it refuses, and Ray would take the signals that are for the jobs.
    """
    if not hasattr(launcher, "ray_cfg"):
        yield BrokenExecutor
        return
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # what jobs print is alike
    import ray
    from ray.exceptions import RayError

    ray.init(**compose.to_dict(launcher.ray_cfg.init))
    try:
        needed = launcher.ray_cfg.remote.get("num_gpus", 0)
        most = max(node["Resources"].get("GPU", 0) for node in ray.nodes())
        if needed > most:
            raise ValueError(f"a job takes {needed} GPUs of one machine, and Ray finds {most:g}; give fewer devices")
        yield RayError
    finally:
        ray.shutdown()


ConfigStore.instance().store(
    group="hydra/sweeper",
    name="genfound",
    node={"_target_": f"{__name__}.{Sweeper.__name__}", "max_batch_size": None, "params": None},
    provider="genfound",
)
