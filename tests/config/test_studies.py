"""The studies of experiments/: each is a sweep by itself, whose jobs all fit together, and has its page."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from genfound import build
from genfound.config import compose, options
from tests.cli.commands import genfound
from tests.helpers import composed

FOLDER = Path(compose.config_dir()) / "experiment"
STUDIES = sorted(file.stem for file in FOLDER.glob("*.yaml"))
PAGES = Path(compose.config_dir()).parent / "experiments"


def sweep(study: str) -> dict[str, list[str]]:
    """{key: values} that a study varies."""
    with_parents = [compose.read_yaml(FOLDER / f"{name}.yaml") for name in (study.removesuffix("_mini"), study)]
    inherits = study.removesuffix("_mini") in with_parents[1].get("defaults", ())
    found: dict[str, Any] = {}
    for file in with_parents if inherits else with_parents[1:]:
        found |= file.get("hydra", {}).get("sweeper", {}).get("params", {})
    return {key: str(values).split(",") for key, values in found.items()}


@pytest.mark.parametrize("study", STUDIES)
def test_every_job_of_a_study_can_be_built(study: str) -> None:
    varied = sweep(study)
    assert varied
    for values in itertools.product(*varied.values()):
        job = [f"{key}={value}" for key, value in zip(varied, values, strict=True) if key != "seed"]
        config = composed(f"experiment={study}", *job, resolve=False)
        options.check(config)
        with torch.device("meta"):
            build.net(config, build.published_spec(config), 1000)
        build.objective(config)
        assert config["study"] == study and config["callbacks"]["evaluation"]["every"]


@pytest.mark.parametrize("study", STUDIES)
def test_a_study_has_its_page_and_the_figures_of_the_paper(study: str) -> None:
    page = (PAGES / study / "README.md").read_text()
    assert f"python -m genfound.train experiment={study}" in page and f"genfound.report study={study}" in page
    with (PAGES / study / "paper.csv").open() as file:
        rows = list(csv.DictReader(file))
    varied = sweep(study)
    for row in rows:
        settings = {key: value for key, value in row.items() if key in varied}
        assert settings and all(value in varied[key] for key, value in settings.items()), row
        assert float(row["value"]) and row["source"] and row["protocol"]


def test_a_study_is_a_sweep_without_a_flag(tmp_path: Path) -> None:
    tiny = ["model.width=32", "model.depth=1", "model.heads=1", "data.images=300", "callbacks.evaluation.every=null"]
    varied = ["objective.path=linear,gvp", "objective.prediction=velocity", "seed=0", "trainer.max_steps=1"]
    result = genfound("train", "experiment=sit_axes_mini", *tiny, *varied, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    runs = [folder for folder in (tmp_path / "runs/sit_axes_mini").iterdir() if (folder / "DONE").is_file()]
    assert len(runs) == 2
