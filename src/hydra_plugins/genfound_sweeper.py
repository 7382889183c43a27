"""Hydra finds its plugins in this namespace: the sweeper of genfound, which loses no job to another one."""

import contextlib
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor
from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from omegaconf.errors import OmegaConfBaseException

from genfound.config import sweeps
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

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Say which jobs there are, and launch them; again, once, those whose worker a signal has ended.

        A pool of processes gives up all of its jobs then, of which it cannot tell which one that was.
        """
        sweeps.announce(job_overrides)
        jobs = [job for job in job_overrides if self._composable(job)]
        in_this_process = isinstance(self.launcher, BasicLauncher)
        with contextlib.nullcontext() if in_this_process else sweeps.stopping_jobs():
            while jobs:
                try:
                    return self.launcher.launch(jobs, initial_job_idx)
                except BrokenExecutor as error:
                    jobs = sweeps.left(jobs, f"a worker of the launcher has ended: {sentence(error)}")
        return []

    def _composable(self, job: Sequence[str]) -> bool:
        from genfound.config.command_line import composition_error

        try:
            self.loader.load_sweep_config(self.config, list(job))
        except (HydraException, OmegaConfBaseException) as error:
            sweeps.refuse(job, composition_error(error, self.config.hydra.job.config_name, job))
            return False
        return True


ConfigStore.instance().store(
    group="hydra/sweeper",
    name="genfound",
    node={"_target_": f"{__name__}.{Sweeper.__name__}", "max_batch_size": None, "params": None},
    provider="genfound",
)
