"""The dashboards of a study in Weights & Biases, with an API that keeps what it is sent."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb

from genfound.reporting import dashboard
from genfound.reporting.collect import read_study
from genfound.reporting.dashboard import write_dashboards
from tests.cli.commands import genfound, one_error
from tests.reporting.studies import made_run

METRICS = ["val/velocity_mse_ema", "eval", "train/loss"]
FIGURES = {"val/velocity_mse_ema": [2.0, 1.5], "train/loss": [3.0, 2.0], "eval/fid": [9.0, 8.0]}
ADDRESSES = ["https://wandb.test/team/mine?nw=", "https://wandb.test/team/mine/reports/paths--aWQ1"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two paths of two models, whose W&B project is `mine`; and a study without W&B."""
    folder = tmp_path_factory.mktemp("dashboard")
    for path in ("linear", "gvp"):
        for model in ("nit_tiny", "sit_tiny"):
            overrides = [
                f"objective.path={path}",
                f"model={model}",
                "logger=wandb",
                "logger.wandb.project=mine",
            ]
            made_run(folder / f"runs/paths/{path}-{model}", overrides, FIGURES)
    made_run(folder / "runs/dry/a", [], FIGURES)
    return folder


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The views that were saved, as the server of W&B gets them; it forgets what is taken out."""
    found: list[dict[str, Any]] = []

    def execute_graphql(query: str, variables: dict[str, Any]) -> dict[str, Any]:
        if "upsertView" in query:
            number = variables.get("id") or f"aWQ{len(found)}"
            found.append({**variables, "id": number, "spec": json.loads(variables["spec"])})
            return {"upsertView": {"view": view(found[-1])}}
        if "allViews" in query:
            there = [one for one in found if one["name"] == variables["viewName"]]
            return {"project": {"allViews": {"edges": [{"node": view(one)} for one in there[-1:]]}}}
        if "reportId" in variables:
            there = [one for one in found if one["id"] == variables["reportId"]]
            return {"view": view(there[-1]) if there else None}
        assert variables["entityName"] in ("team", "others") and variables["projectName"] == "mine"
        return {"project": {"internalId": "7"}}

    def view(sent: dict[str, Any]) -> dict[str, Any]:
        project = {"id": "7", "name": "mine", "entityName": sent["entityName"]}
        times = {"createdAt": "2026-01-01T00:00:00", "updatedAt": "2026-01-01T00:00:00"}
        names = {key: sent[key] for key in ("id", "name", "displayName")}
        return {**names, "description": "", "project": project, "spec": json.dumps(sent["spec"]), **times}

    class Api:
        default_entity = "team"

        def __init__(self) -> None:
            self._service_api = SimpleNamespace(execute_graphql=execute_graphql, app_url="https://wandb.test")

        def projects(self, entity: str) -> list[Any]:
            return [SimpleNamespace(name="mine")]

    monkeypatch.setattr(wandb, "Api", Api)
    monkeypatch.delenv("WANDB_ENTITY", raising=False)
    return found


def kinds(panels: list[dict[str, Any]]) -> list[str]:
    return [panel["viewType"] for panel in panels]


COMPARED = [
    *["Run History Line Plot"] * 3, *["Bar Chart"] * 2, "Parameter Importance", "Parallel Coordinates Plot",
    "Media Browser", "Weave",
]  # fmt: skip


def test_without_a_login_the_command_leaves_a_script_that_saves_them(
    root: Path, sent: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    result = genfound("report", "study=paths", "wandb=true", cwd=root)
    assert result.returncode == 0, result.stderr
    line = "W&B dashboards, once you are logged in and the runs are synced: python runs/paths/report/wandb_report.py"
    assert result.stdout.splitlines()[-1] == line
    out = root / "runs/paths/report"
    view = json.loads((out / "wandb_workspace.json").read_text())
    runpy.run_path(str(out / "wandb_report.py"), run_name="__main__")
    shown = capsys.readouterr().out.split()
    assert all(address.startswith(start) for address, start in zip(shown, ADDRESSES, strict=True))
    workspace, report = sent
    assert (workspace["displayName"], report["displayName"]) == ("paths", "paths")
    for spec in (view["spec"], workspace["spec"]):
        [section], [runs] = spec["section"]["panelBankConfig"]["sections"], spec["section"]["runSets"]
        assert kinds(section["panels"]) == COMPARED
        assert runs["filters"]["filters"][0] == {
            "key": {"section": "run", "name": "group"}, "op": "=", "value": "paths", "disabled": False,
        }  # fmt: skip
        assert [key["name"] for key in runs["grouping"]] == ["objective.value.path", "options.value.model"]
        assert "summary:best/eval/fid" in runs["runFeed"]["columnOrder"]
        assert spec["section"]["settings"]["xAxis"] == "images_seen"
    grids = [block["metadata"] for block in report["spec"]["blocks"] if block["type"] == "panel-grid"]
    assert kinds(grids[0]["panelBankSectionConfig"]["panels"]) == COMPARED
    assert [len(grid["runSets"][0]["grouping"]) for grid in grids] == [2, 0]


def test_with_a_login_they_are_saved(
    root: Path, tmp_path: Path, sent: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dashboard, "mode", lambda: "online")
    of_one_path = [run for run in read_study(root / "runs/paths") if "linear" in run.folder.name]
    shown = write_dashboards(of_one_path, METRICS, tmp_path).splitlines()
    assert all(address.startswith(start) for address, start in zip(shown, ADDRESSES, strict=True))
    [section] = sent[0]["spec"]["section"]["panelBankConfig"]["sections"]
    assert "Parallel Coordinates Plot" not in kinds(section["panels"])  # of one key there is nothing to weigh

    monkeypatch.setattr(wandb.Api, "default_entity", None)
    with pytest.raises(ValueError, match="no default team; name one in WANDB_ENTITY; try again later"):
        write_dashboards(of_one_path, METRICS, tmp_path)

    def fail(*_: Any, **__: Any) -> None:
        raise wandb.errors.CommError("no way to the server")

    monkeypatch.setattr(dashboard.wandb_report, "save", fail)
    with pytest.raises(
        ValueError, match=r"wandb=true: no way to the server; try again later: python .*/wandb_report.py"
    ):
        write_dashboards(of_one_path, METRICS, tmp_path)


def test_given_again_they_are_updated_and_what_was_deleted_is_saved_anew(
    root: Path, tmp_path: Path, sent: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dashboard, "mode", lambda: "online")
    runs = read_study(root / "runs/paths")
    of_one_path = [run for run in runs if "linear" in run.folder.name]
    first, again = (write_dashboards(some, METRICS, tmp_path) for some in (of_one_path, runs))
    assert first == again
    assert [view["id"] for view in sent] == ["aWQ0", "aWQ1"] * 2
    assert sent[2]["name"] == sent[0]["name"]
    [section] = sent[2]["spec"]["section"]["panelBankConfig"]["sections"]
    assert kinds(section["panels"]) == COMPARED
    grids = [block["metadata"] for block in sent[3]["spec"]["blocks"] if block["type"] == "panel-grid"]
    assert kinds(grids[0]["panelBankSectionConfig"]["panels"]) == COMPARED and len(grids) == 2

    sent.clear()
    write_dashboards(runs, METRICS, tmp_path)
    assert len(sent) == 2
    monkeypatch.setenv("WANDB_ENTITY", "others")
    assert "/others/mine" in write_dashboards(runs, METRICS, tmp_path)


def test_a_study_that_has_not_logged_to_wandb_is_refused(root: Path) -> None:
    error = one_error(genfound("report", "study=dry", "wandb=true", cwd=root))
    assert "wandb=true needs runs of one W&B project, not of none; train with logger=wandb" in error
