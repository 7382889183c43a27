"""The page of a study, and the command that writes it."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from genfound.loggers import provenance
from genfound.reporting import plots
from genfound.reporting.collect import Run, labels, metric_names, read_study
from genfound.reporting.page import write_report
from genfound.runtime.files import visible
from genfound.training import fit
from tests.cli.commands import genfound, one_error
from tests.evaluation.test_protocol import DRAWING, PROTOCOL, result
from tests.helpers import run_dir
from tests.reporting.studies import made_run, made_study

METRIC = "val/velocity_mse_ema"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    made_study(folder / "runs/paths")
    (folder / "experiments/paths").mkdir(parents=True)
    (folder / "experiments/paths/findings.md").write_text("GVP is as good as linear.\n\nMore seeds are needed.\n")
    return folder


def test_the_page_holds_all_that_it_shows(root: Path, tmp_path: Path) -> None:
    runs = read_study(root / "runs/paths")
    for run in runs[:3]:
        line = {"step": 0, "commit": "abc" if run.seed else "def"}
        (run.folder / provenance.FILE).write_text(json.dumps(line) + "\n")
    text = write_report(runs, [METRIC], root / "experiments/paths", tmp_path)
    assert "gvp" in text and "1.3 ± " in text
    page = (tmp_path / "index.html").read_text()
    assert "2 trained by commit abc." in page and "1 trained by commit def." in page
    assert "<p>GVP is as good as linear.</p>" in page and "no room &lt;on&gt; the disk" in page
    for heading in ("Results", f"Effects on {METRIC}", "Curves", "Samples", "Jobs"):
        assert f"<h2>{heading}</h2>" in page
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) == 4 + 3 and all(source.startswith("data:image/") for source in sources)
    written = {f"{name}.{suffix}" for name in ("effects", "jobs", "results") for suffix in ("csv", "md", "tex")}
    assert {file.name for file in visible(tmp_path)} == {"index.html", *written}


def test_a_figure_of_several_sizes_is_drawn_against_them() -> None:
    measured = [("a", "16x16", 1.0), ("a", "8x8", 2.0), ("b", "16x16", 3.0)]
    runs = [
        Run(
            Path(model), {}, {"model": model, "size": size}, pd.DataFrame([{"images_seen": 0, "fd": value}]), "done", ""
        )
        for model, size, value in measured
    ]
    drawn = plots.against(runs, "fd", "size")
    assert b"<svg" in drawn and all(f"<!-- {text} -->".encode() in drawn for text in ("16x16", "8x8", "a", "b"))


def test_ways_of_sampling_are_drawn_against_their_numbers(tmp_path: Path) -> None:
    made_run(tmp_path / "network", ["model.depth=1"], {})
    for scale, interval in itertools.product((1.5, 2.5), ([0.0, 1.0], [0.0, 0.7])):
        drawing = replace(DRAWING, guidance={"name": "cfg", "scale": scale, "interval": interval})
        figures = result(fid=scale, protocol=replace(PROTOCOL, drawing=drawing), **{"from": str(tmp_path / "network")})
        figures.append_to(tmp_path / "study/ways")
    write_report(read_study(tmp_path / "study"), ["eval"], tmp_path, tmp_path / "out")
    page = (tmp_path / "out/index.html").read_text()
    assert re.findall(r'alt="(.*) by (.*)"', page) == [
        ("eval/fid", "guidance.scale"),
        ("eval/recall", "guidance.scale"),
    ]


def test_a_metric_that_is_wanted_twice_is_there_once(root: Path) -> None:
    runs = read_study(root / "runs/paths")
    assert metric_names(runs, ["train/loss", "train"]) == [
        "train/loss",
        "train/loss_t/0.00-0.50",
        "train/loss_t/0.50-1.00",
    ]


def test_the_load_of_experts_is_drawn_from_what_a_run_logs(tmp_path: Path) -> None:
    small = ["model=dit_moe_tiny", "model.width=32", "model.depth=1", "model.heads=1", "data.images=300"]
    steps = ["trainer.max_steps=2", "trainer.log_every_n_steps=1", "callbacks.preview.every=null", "logger=jsonl"]
    fit(run_dir(tmp_path / "study/run", *small, *steps))
    drawn = plots.expert_load(read_study(tmp_path / "study"))
    assert not (tmp_path / "study/run/samples").exists()
    assert drawn and b"<!-- largest load of an expert -->" in drawn


def test_the_command_writes_into_the_study(root: Path) -> None:
    result = genfound("report", "study=paths", cwd=root)
    assert result.returncode == 0, result.stderr
    assert "7 runs: runs/paths/report/index.html" in result.stdout
    assert (root / "runs/paths/report/results.md").read_text().startswith("| objective.path | done | Gflops | val/")
    again = genfound("report", "study=paths", "watch=true", f"out={root}/out", cwd=root)
    assert "failed" in again.stdout and "left" in again.stdout and (root / "out/index.html").is_file()


DAMAGED = {
    "overrides.json": "is damaged: Expecting value: line 1 column 2 (char 1); remove it",
    "STOPPED": "is damaged: it holds no dict; remove it",
    "config.yaml": "is damaged: it holds no settings",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_named(name: str, tmp_path: Path) -> None:
    made_run(tmp_path / "s/a", [], {METRIC: [1.0, 0.5]}, state="STOPPED")
    (tmp_path / "s/a" / name).write_text("[" if name == "overrides.json" else "[1]")
    with pytest.raises(ValueError, match=re.escape(f"s/a/{name} {DAMAGED[name]}")):
        read_study(tmp_path / "s")


def test_what_is_no_number_is_no_figure(tmp_path: Path) -> None:
    made_run(tmp_path / "s/a", [], {METRIC: [1.0, 0.5]}, state="FAILED")
    lines = (
        b'garbage\n{"step": 30, "images_seen": "many"}\n{"step": 30, "images_seen": 300, "train/loss": "bad"}\n\xff\n'
    )
    with (tmp_path / "s/a/metrics.jsonl").open("ab") as out:
        out.write(lines)
    (tmp_path / "s/a/FAILED").write_bytes(b"no room \xff\n")
    [run] = read_study(tmp_path / "s")
    assert run.images_seen == 300 and list(run.values(METRIC)) == [1.0, 0.5] and not len(run.values("train/loss"))
    assert run.reason == "no room \N{REPLACEMENT CHARACTER}"


def test_a_seed_that_is_none_is_named(tmp_path: Path) -> None:
    made_run(tmp_path / "s/a", [], {METRIC: [1.0, 0.5]})
    file = tmp_path / "s/a/config.yaml"
    file.write_text(file.read_text().replace("seed: 0", "seed: x"))
    with pytest.raises(ValueError, match=r"s/a/config.yaml: seed=x must be a whole number"):
        read_study(tmp_path / "s")


def test_runs_are_told_apart_by_what_varies(root: Path) -> None:
    runs = read_study(root / "runs/paths")
    assert labels(runs)[:2] == ["objective.path=linear seed=0", "objective.path=linear seed=1"]
    assert labels([runs[0], runs[0]]) == [runs[0].folder.name] * 2


WRONG = {
    "study=other": "study=other: there is no folder runs/other; train with study=other",
    "study=paths metrics=[val/fid]": "metrics=['val/fid']: no run of the study has any of them",
    "study=paths metric=x": "unknown key metric; did you mean metrics?",
    "study=null": "study=None must consist of letters",
    "study=..": "study=.. must consist of letters",
    "study=": "study= must consist of letters",
    "": "study is missing; give study=...",
}


@pytest.mark.parametrize("arguments", WRONG)
def test_wrong_input_is_one_line(root: Path, arguments: str) -> None:
    assert WRONG[arguments] in one_error(genfound("report", *arguments.split(), cwd=root))
