"""Saves a workspace and a report that compare the runs of a study in Weights & Biases: `python wandb_report.py`.

What they compare is in wandb_report.json beside it. Needs `pip install wandb-workspaces` and `wandb login` alone.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import wandb
import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws
from wandb_workspaces import expr


def panels(keys: Sequence[str], metrics: Sequence[str], best: Sequence[str]) -> list[Any]:
    """Curves over images seen, best values, what the swept keys do to the first of them, and samples."""
    curves = [wr.LinePlot(title=metric, x="images_seen", y=[metric]) for metric in metrics]
    bars = [wr.BarPlot(title=metric, metrics=[metric]) for metric in best]
    swept = []
    if len(keys) > 1 and best:
        axes = [*map(wr.Config, keys), wr.SummaryMetric(best[0])]
        columns = [wr.ParallelCoordinatesPlotColumn(metric=axis) for axis in axes]
        swept = [wr.ParameterImportancePlot(with_respect_to=best[0]), wr.ParallelCoordinatesPlot(columns=columns)]
    samples = [wr.MediaBrowser(media_keys=["samples"]), wr.WeavePanelSummaryTable(table_name="samples_table")]
    return [*curves, *bars, *swept, *samples]


def workspace(entity: str, project: str, study: str, keys: Sequence[str], **shown: Sequence[str]) -> ws.Workspace:
    """The runs of the study alone, grouped by the swept keys, so that a curve is the mean over seeds."""
    groups = [expr.Config(key) for key in keys]
    columns = [f"summary:{metric}" for metric in (*shown["best"], *shown["metrics"])]
    runs = ws.RunsetSettings(filters=[expr.Metric("Group") == study], groupby=groups, pinned_columns=columns)
    sections = [ws.Section(name=study, panels=panels(keys, **shown), is_open=True)]
    axis = ws.WorkspaceSettings(x_axis="images_seen")
    return ws.Workspace(entity, project, study, sections, settings=axis, runset_settings=runs)


def report(entity: str, project: str, study: str, keys: Sequence[str], **shown: Sequence[str]) -> wr.Report:
    """The same as a report, with a table of what differs between the runs."""
    of_study = {"entity": entity, "project": project, "filters": [expr.Metric("Group") == study]}
    grouped = wr.Runset(name=study, groupby=[f"config.{key}" for key in keys], **of_study)
    each = wr.PanelGrid(runsets=[wr.Runset(name="all runs", **of_study)], panels=[wr.RunComparer(diff_only="split")])
    blocks = [wr.PanelGrid(runsets=[grouped], panels=panels(keys, **shown)), wr.H2("Settings of each run"), each]
    return wr.Report(project=project, entity=entity, title=study, blocks=blocks, width="fluid")


def save(folder: Path, **compared: Any) -> list[str]:
    """Save both for who is logged in, or for the team of WANDB_ENTITY; returns their addresses.

    Those of before are in wandb_urls.json of the folder: what is there is given the new content.

    Raises:
        ValueError: the login has no default team, and none is named.
    """
    entity = os.environ.get("WANDB_ENTITY") or wandb.Api().default_entity
    if not entity:
        raise ValueError("this login has no default team; name one in WANDB_ENTITY")
    file, owner = folder / "wandb_urls.json", f"{entity}/{compared['project']}"
    known = json.loads(file.read_text()) if file.is_file() else {}
    views = (workspace(entity, **compared), report(entity, **compared))
    urls = [_at(url, view).save().url for url, view in zip(known.get(owner, ("", "")), views, strict=True)]
    file.write_text(json.dumps({**known, owner: urls}, indent=1) + "\n")
    return urls


CONTENT = {ws.Workspace: ("sections", "settings", "runset_settings"), wr.Report: ("blocks",)}


def _at(url: str, view: Any) -> Any:
    """The view at an address with the content of another one, which it is itself if there is none any more."""
    try:
        there = type(view).from_url(url)
    except (ValueError, TypeError):  # the latter of a report that was deleted
        return view
    for name in CONTENT[type(view)]:
        setattr(there, name, getattr(view, name))
    return there


if __name__ == "__main__":
    own = Path(__file__)
    print(*save(own.parent, **json.loads(own.with_suffix(".json").read_text())), sep="\n")
