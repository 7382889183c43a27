"""`python -m genfound.report study=NAME`: tables, plots and one self-contained page about the runs of a study."""

from pathlib import Path

from omegaconf import DictConfig

from genfound.config import command_line, compose
from genfound.runtime import run_directory


def _task(cfg: DictConfig) -> None:
    config = compose.to_dict(cfg)
    try:
        if config["wandb"]:
            from genfound.reporting.dashboard import write_dashboards
        from genfound.reporting.collect import read_study
        from genfound.reporting.page import write_report
        from genfound.reporting.watch import watch
    except ImportError as error:
        raise ValueError(f"{error}; reports need more packages: pip install genfound[report]") from None
    run_directory.check_name("study", config["study"])
    folder = Path(config["runs"]) / str(config["study"])
    if config["watch"]:
        watch(folder)
    runs = read_study(folder)
    notes = Path(config["notes"] or Path("experiments") / folder.name)
    out = Path(config["out"] or folder / "report")
    print(write_report(runs, config["metrics"], notes, out))
    print(f"{len(runs)} runs: {out / 'index.html'}")
    if config["wandb"]:
        print(write_dashboards(runs, config["metrics"], out))


def main() -> None:
    """Console entry point."""
    command_line.hydra_main(_task, "report")


if __name__ == "__main__":
    main()
