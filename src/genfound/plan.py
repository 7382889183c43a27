"""`python -m genfound.plan model=... data=... trainer.devices=N`: what a training would need; nothing is trained."""

from omegaconf import DictConfig

from genfound.config import command_line, compose

_hours: list[dict[str, float]] = []
"""{accelerator: hours of one of them} of each job."""


def _task(cfg: DictConfig) -> None:
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from genfound.config.options import check
    from genfound.config.sweeps import swept_keys
    from genfound.reporting.estimate import ACCELERATORS, estimate
    from genfound.runtime import run_directory

    config, hydra = compose.with_own_targets(compose.to_dict(cfg)), HydraConfig.get()
    check(config)
    found = estimate(config)
    _hours.append({name: found.hours(accelerator) for name, accelerator in ACCELERATORS.items()})
    folder = run_directory.run_dir(cfg, list(hydra.overrides.task), swept_keys())
    if hydra.mode == RunMode.MULTIRUN:
        print(f"{folder.name}: {found.line()}", flush=True)
    else:
        print("\n".join([*found.lines(), *found.measured(folder)]), flush=True)


def main() -> None:
    """Console entry point."""
    try:
        command_line.hydra_main(_task, "train", may_lack=("data.root", "tokenizer.weights"))
    finally:
        if len(_hours) > 1:
            sums = (f"{sum(job[name] for job in _hours):,.1f} {name} hours" for name in _hours[0])
            print(f"all {len(_hours)} jobs: {', '.join(sums)}")


if __name__ == "__main__":
    main()
