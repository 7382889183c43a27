"""The page of a study: one HTML file without a request to anywhere, and its tables as files."""

import base64
import functools
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from PIL import Image

from genfound.loggers.provenance import in_words, provenance
from genfound.reporting import plots, tables
from genfound.reporting.collect import Run, evaluated, metric_names, varied
from genfound.runtime.files import atomic_write

TEMPLATE = Path(__file__).with_name("page.html.jinja")
MOST_PICTURES = 12
FINDINGS, PUBLISHED = "findings.md", "paper.csv"
"""Beside a study: sentences for the top of the page, a paragraph a line; and the figures of the paper."""


def write_report(runs: Sequence[Run], wanted: Sequence[str], notes: Path, out: Path) -> str:
    """Write index.html, and each table as CSV, Markdown and LaTeX; returns the table of results as text.

    Where networks were sampled in several ways, the results are those of the ways, not of the training.

    Raises:
        ValueError: no run has any of the wanted metrics, or paper.csv lacks a column.
    """
    ways = evaluated(runs)
    compared = ways or runs
    metrics = metric_names(compared, wanted)
    if not metrics and any(run.state == "done" for run in compared):
        raise ValueError(f"metrics={list(wanted)}: no run of the study has any of them")
    found = {"results": tables.summary(compared, metrics)}
    if metrics:
        found["effects"] = tables.effects(compared, metrics[0])
    found |= {"evaluations": tables.evaluations(runs), "jobs": tables.jobs(runs)}
    remark = ""
    if metrics and (notes / PUBLISHED).is_file():
        found["paper"], remark = tables.beside_paper(compared, metrics[0], notes / PUBLISHED)
    found = {name: frame for name, frame in found.items() if len(frame)}
    for name, frame in found.items():
        _write_table(out / name, frame)
    drawn = [*_plots(runs, metric_names(runs, wanted)), *_plots_of_ways(ways, metrics)]
    page = _render(runs, metrics, found, remark, _paragraphs(notes / FINDINGS), drawn)
    atomic_write(out / "index.html", lambda temporary: temporary.write_text(page))
    return tables.rounded(found["results"]).to_string(index=False)


def _write_table(file: Path, frame: pd.DataFrame) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    shown = tables.rounded(frame)
    texts = {"csv": frame.to_csv(index=False), "md": tables.markdown(shown)}
    texts["tex"] = shown.style.hide(axis="index").format(escape="latex").format_index(escape="latex", axis=1).to_latex()
    for suffix, text in texts.items():
        atomic_write(file.with_suffix(f".{suffix}"), functools.partial(Path.write_text, data=text))


def _paragraphs(file: Path) -> list[str]:
    text = file.read_text(errors="replace") if file.is_file() else ""
    return [line for line in text.splitlines() if line.strip()]


def _render(
    runs: Sequence[Run], metrics: Sequence[str], found: dict[str, pd.DataFrame], remark: str, findings: Sequence[str],
    drawn: Sequence[tuple[str, bytes | None]],
) -> str:  # fmt: skip
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    counts = {state: sum(run.state == state for run in runs) for state in ("done", "failed", "at work", "stopped")}
    return environment.from_string(TEMPLATE.read_text()).render(
        study=runs[0].folder.parent.name,
        findings=findings,
        metric=metrics[0] if metrics else None,
        counts={state: count for state, count in counts.items() if count},
        tables={name: tables.rounded(frame) for name, frame in found.items()},
        remark=remark,
        plots=[(title, _embedded(image, "svg+xml")) for title, image in drawn if image],
        pictures=_pictures(runs),
        trained=Counter(code for run in runs for code in run.code),
        written=in_words(provenance()),
    )


def _plots(runs: Sequence[Run], metrics: Sequence[str]) -> Iterator[tuple[str, bytes | None]]:
    """(title, SVG) of every plot that the runs have the figures for."""
    for metric in metrics:
        yield f"{metric} against images seen", plots.curves(runs, metric)
    if metrics:
        yield f"{metrics[0]} against cost", plots.against_cost(runs, metrics[0])
    yield "Loss by time", plots.time_bins(runs)
    yield "Largest load of an expert", plots.expert_load(runs)
    yield "Speed", plots.speed(runs)


def _plots_of_ways(ways: Sequence[Run], metrics: Sequence[str]) -> Iterator[tuple[str, bytes | None]]:
    """(title, SVG) of each metric against each size and number in which ways of sampling differ."""
    for metric, key in itertools.product(metrics, varied(ways)):
        if key == "size" or all(run.setting(key).replace(".", "", 1).isdecimal() for run in ways):
            yield f"{metric} by {key}", plots.against(ways, metric, key)


def _pictures(runs: Sequence[Run]) -> list[tuple[str, str, int]]:
    """(caption, picture, width) of the last samples of the first seed of each setting, all from the same noise."""
    shown = []
    for setting, same in tables.by_setting(runs).items():
        first = next((run for run in sorted(same, key=lambda run: run.seed) if run.picture), None)
        if first is not None and first.picture is not None:
            with Image.open(first.picture) as picture:
                width = picture.width
            caption = f"{tables.label(setting)}, seed {first.seed}"
            shown.append((caption, _embedded(first.picture.read_bytes(), "png"), width))
    return shown[:MOST_PICTURES]


def _embedded(data: Any, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
