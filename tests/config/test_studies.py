"""The studies of experiments/: each is a sweep by itself, whose jobs all fit together, and has its page."""

from __future__ import annotations

import csv
import functools
import itertools
import re
from pathlib import Path

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser

from genfound import build
from genfound.config import compose, options
from genfound.evaluation.protocol import EvaluationRequest
from genfound.layers.rope import RULES
from genfound.reporting.estimate import estimate
from tests.cli.commands import TINY, genfound
from tests.helpers import composed

FOLDER = Path(compose.config_dir()) / "experiment"
TRAINED = sorted(file.stem for file in FOLDER.glob("*.yaml"))
SAMPLED = sorted(file.stem for file in FOLDER.glob("evaluate/*.yaml"))
STUDIES = sorted({*TRAINED, *SAMPLED})
PAGES = Path(compose.config_dir()).parent / "experiments"


def sweep(file: Path) -> dict[str, list[str]]:
    """{key: values} that a study varies, with those of the study that it begins with."""
    read = compose.read_yaml(file)
    found: dict[str, list[str]] = {}
    for parent in read.get("defaults", ()):
        if isinstance(parent, str) and (file.parent / f"{parent}.yaml").is_file():
            found |= sweep(file.parent / f"{parent}.yaml")
    params = read.get("hydra", {}).get("sweeper", {}).get("params", {})
    for one in OverridesParser.create().parse_overrides([f"{key}={value}" for key, value in params.items()]):
        swept = one.is_sweep_override()
        values = one.sweep_string_iterator() if swept else [one.get_value_element_as_str()]
        found[one.key_or_group] = [{"True": "true", "False": "false"}.get(value, value) for value in values]
    return found


def trained_jobs(study: str) -> list[list[str]]:
    """The overrides of each job, one for all seeds."""
    varied = {key: values for key, values in sweep(FOLDER / f"{study}.yaml").items() if key != "seed"}
    jobs = itertools.product(*([f"{key}={value}" for value in values] for key, values in varied.items()))
    return [list(job) for job in jobs]


@pytest.mark.parametrize("study", TRAINED)
def test_every_job_of_a_study_can_be_built(study: str) -> None:
    assert compose.read_yaml(FOLDER / f"{study}.yaml")["study"] == study
    for job in trained_jobs(study):
        config = composed(f"experiment={study}", *job, resolve=False)
        options.check(config)
        with torch.device("meta"):
            build.net(config, build.published_spec(config), 1000)
        build.objective(config)
        assert study in SAMPLED or config["callbacks"]["evaluation"]["every"]


@pytest.mark.parametrize("study", SAMPLED)
def test_every_evaluation_of_a_study_fits_the_networks_that_it_names(study: str) -> None:
    file = FOLDER / "evaluate" / f"{study}.yaml"
    varied = sweep(file)
    for run in varied.pop("from"):
        folder = Path(run)
        job = [part.replace("-", "=", 1) for part in folder.name.split("__")[1:]]
        trained = composed(f"experiment={folder.parent.name}", *job, resolve=False)
        assert {part.partition("=")[0] for part in job} <= sweep(FOLDER / f"{folder.parent.name}.yaml").keys()
        assert folder.name.split("__")[0] == trained["name"] and folder.parts[0] == trained["runs"]
        unit = build.published_spec(trained).stride * trained["model"]["patch_size"]
        config = composed(f"experiment=evaluate/{study}", f"from={run}", "reference=data", name="evaluate")
        request = EvaluationRequest(config, [], "mini")
        request.check()
        assert request.sizes((unit, unit), unit) and study in (config["study"], folder.parent.name)
        assert not any(key.startswith("rope") for key in varied) or "rope_scaling" in trained["model"]
    assert set(varied.get("rope.rule", ())) <= set(RULES)
    assert study.endswith("_mini") == (
        compose.read_yaml(file).get("defaults", [{}])[0] == {"override /protocol": "mini"}
    )


@functools.cache
def page(study: str) -> str:
    return (PAGES / study / "README.md").read_text()


@pytest.mark.parametrize("study", STUDIES)
def test_a_study_has_its_page(study: str) -> None:
    assert f"genfound.report study={study}" in page(study)
    assert study not in TRAINED or f"python -m genfound.train experiment={study}" in page(study)
    assert study not in SAMPLED or f"python -m genfound.evaluate experiment=evaluate/{study}" in page(study)
    assert (PAGES / study / "report/index.html").is_file() != ("not run" in page(study))
    assert (
        f"[{study.removesuffix('_mini')}]({study.removesuffix('_mini')}/README.md)" in (PAGES / "README.md").read_text()
    )


@pytest.mark.parametrize("study", STUDIES)
def test_the_figures_of_the_paper_are_of_settings_of_the_study(study: str) -> None:
    if not (PAGES / study / "paper.csv").is_file():
        assert "no published figure" in page(study)
        return
    varied: dict[str, list[str]] = {}
    for file in (FOLDER / f"{study}.yaml", FOLDER / f"evaluate/{study}.yaml"):
        varied |= sweep(file) if file.is_file() else {}
    if study in SAMPLED:
        sizes = compose.read_yaml(FOLDER / f"evaluate/{study}.yaml").get("sizes", ())
        varied["size"] = ["x".join(map(str, size)) for size in sizes]
    with (PAGES / study / "paper.csv").open() as opened:
        rows = list(csv.DictReader(opened))
    assert rows
    for row in rows:
        settings = {key: value for key, value in row.items() if key in varied}
        assert set(row) - set(settings) == {"metric", "value", "protocol", "source"}
        assert all(value in ("", *varied[key]) for key, value in settings.items()), row
        assert float(row["value"]) and row["source"] and row["protocol"]


@pytest.mark.parametrize("study", [study for study in TRAINED if not study.endswith("_mini")])
def test_the_cost_on_a_page_is_what_plan_says(study: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("genfound.reporting.estimate.activations", lambda *_: (0, 0))  # slow, and not on the page
    lines = re.findall(r"^    \S.*: ([\d,]+) parameters, (\S+) FLOPs, ([\d,.]+) A100", page(study), re.MULTILINE)
    jobs = trained_jobs(study)
    assert len(lines) in (1, len(jobs))
    for job, line in zip([jobs[0], jobs[-1]], [lines[0], lines[-1]], strict=True):
        config = composed(f"experiment={study}", *job, "trainer.devices=8", resolve=False)
        found = re.match(r"([\d,]+) parameters, (\S+) FLOPs, ([\d,.]+) A100", estimate(config).line())
        assert found and found.groups() == line


def test_a_study_is_a_sweep_without_a_flag(tmp_path: Path) -> None:
    tiny = ["model.width=32", "model.depth=1", "model.heads=1", "data.images=300", "callbacks.evaluation.every=null"]
    varied = ["objective.path=linear,gvp", "objective.prediction=velocity", "seed=0", "trainer.max_steps=1"]
    result = genfound("train", "experiment=sit_axes_mini", *tiny, *varied, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    runs = [folder for folder in (tmp_path / "runs/sit_axes_mini").iterdir() if (folder / "DONE").is_file()]
    assert len(runs) == 2


@pytest.mark.slow
def test_networks_are_trained_once_and_sampled_in_each_way(tmp_path: Path) -> None:
    """The commands of experiments/guidance_interval_mini, small."""
    tiny = [
        *TINY,
        "sampler.steps=1",
        "data.images=300",
        "data.holdout=100",
        "data.sides=[12,16]",
        "trainer.max_steps=1",
    ]
    trained = genfound("train", "experiment=nit_resolutions_mini", "model=nit_tiny", "seed=0,1", *tiny, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    names = [f"runs/nit_resolutions_mini/small__model-nit_tiny__seed-{seed}" for seed in (0, 1)]
    assert all((tmp_path / name / "DONE").is_file() for name in names), sorted(tmp_path.glob("runs/*/*"))
    ways = [
        "guidance.scale=1.5,4.0",
        "guidance.interval=[0.0,1.0]",
        "n=70",
        "batch=35",
        "reference_images=100",
        "runs=sampled",
    ]
    sampled = genfound(
        "evaluate", "experiment=evaluate/guidance_interval_mini", f"from={','.join(names)}", *ways, cwd=tmp_path
    )
    assert sampled.returncode == 0, sampled.stderr
    told = genfound("report", "study=guidance_interval_mini", "runs=sampled", cwd=tmp_path)
    assert told.returncode == 0, told.stderr
    report = tmp_path / "sampled/guidance_interval_mini/report"
    assert re.search(r"\| 4.0 \| 2 of 2 \|", (report / "results.md").read_text())
    assert re.search(r"\| guidance.scale \| 1.5 \| 4.0 \| all \| 2 \|", (report / "effects.md").read_text())
    assert not (report / "paper.csv").exists() and "<h2>Evaluations</h2>" in (report / "index.html").read_text()
