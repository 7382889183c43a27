"""Tables of a study: means over seeds, effects between settings, the paper's figures, and what failed."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from genfound.evaluation.protocol import Protocol, differences, size_text
from genfound.loggers.base import higher_is_better
from genfound.reporting.collect import Run, evaluated, evaluated_run, varied

CONFIDENCE, POWER = 0.95, 0.8
"""Of intervals; and how often an effect of the detectable size would be found."""

PAPER = ("metric", "value", "protocol", "source")
"""Columns of a paper.csv that are no settings."""


def half_width(values: Sequence[float] | np.ndarray) -> float:
    """Half of the 95 % interval of a mean by Student's t; NaN of fewer than two values."""
    count = len(values)
    if count < 2:
        return float("nan")
    quantile = stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)
    return float(quantile * np.std(values, ddof=1) / np.sqrt(count))


def detectable(values: Sequence[float] | np.ndarray) -> float:
    """The smallest mean difference that so many pairs find in 80 of 100 studies, of the spread that they have."""
    count = len(values)
    if count < 2:
        return float("nan")
    quantiles = stats.t.ppf((1 + CONFIDENCE) / 2, count - 1) + stats.t.ppf(POWER, count - 1)
    return float(quantiles * np.std(values, ddof=1) / np.sqrt(count))


def by_setting(runs: Sequence[Run]) -> dict[tuple[str, ...], list[Run]]:
    """The values of what varies -> the runs that have them, one for each seed."""
    keys, groups = varied(runs), dict[tuple[str, ...], list[Run]]()
    for run in runs:
        groups.setdefault(tuple(run.setting(key) for key in keys), []).append(run)
    return groups


def label(setting: Sequence[str]) -> str:
    """A setting in a legend."""
    return ", ".join(setting) or "all runs"


def summary(runs: Sequence[Run], metrics: Sequence[str]) -> pd.DataFrame:
    """A row for each setting, the best first: how many runs are done, and the mean +- interval of each metric."""
    rows = []
    for setting, same in by_setting(runs).items():
        done = [run for run in same if run.state == "done"]
        row: dict[str, object] = dict(zip(varied(runs), setting, strict=True))
        row |= {"done": f"{len(done)} of {len(same)}", "Gflops": mean(done, "perf/gflops_per_image")}
        for metric in metrics:
            values = [*{run.seed: run.last(metric) for run in done if not np.isnan(run.last(metric))}.values()]
            row[metric] = float(np.mean(values)) if values else float("nan")
            row[f"{metric} +-"] = half_width(values)
        rows.append(row)
    frame = pd.DataFrame(rows)
    if metrics:
        frame = frame.sort_values(metrics[0], ascending=not higher_is_better(metrics[0]))
    return frame.dropna(axis="columns", how="all")


def mean(runs: Sequence[Run], metric: str) -> float:
    """Of the last values of a metric; NaN if no run has any."""
    values = [run.last(metric) for run in runs]
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def effects(runs: Sequence[Run], metric: str) -> pd.DataFrame:
    """What each value of a setting changes against its first one, over pairs that agree in all else, the seed too.

    Over all pairs, and for each combination of the other settings alone, where there are several.
    """
    rows, keys = [], varied(runs)
    done = [run for run in runs if run.state == "done" and not np.isnan(run.last(metric))]
    for key in keys:
        values = list(dict.fromkeys(run.setting(key) for run in done))
        rest = [other for other in keys if other != key]
        figure = {(run.setting(key), tuple(run.setting(k) for k in rest), run.seed): run.last(metric) for run in done}
        for value, other in itertools.product(values[1:], [None, *dict.fromkeys(place[1] for place in figure)]):
            places = [place[1:] for place in figure if place[0] == value and other in (None, place[1])]
            pairs = [(figure[values[0], *at], figure[value, *at]) for at in places if (values[0], *at) in figure]
            if pairs and (other is None or len({place[1] for place in figure}) > 1):
                where = ", ".join(f"{k}={v}" for k, v in zip(rest, other or (), strict=False)) or "all"
                rows.append({"setting": key, "from": values[0], "to": value, "where": where, **_effect(pairs, metric)})
    return pd.DataFrame(rows)


def _effect(pairs: Sequence[tuple[float, float]], metric: str) -> dict[str, object]:
    """Of pairs (before, after)."""
    before, after = np.array(pairs).T
    change = after - before
    return {
        "pairs": len(change), "effect": float(change.mean()), "effect +-": half_width(change),
        "relative": float(change.mean() / before.mean()), "detectable": detectable(change),
        "verdict": verdict(change, metric),
    }  # fmt: skip


def verdict(pairs: np.ndarray, metric: str) -> str:
    """In a word, whether an effect is told apart from none."""
    half = half_width(pairs)
    if np.isnan(half):
        return "one pair"
    if abs(pairs.mean()) <= half:
        return "not told apart"
    return "better" if (pairs.mean() > 0) == higher_is_better(metric) else "worse"


def beside_paper(runs: Sequence[Run], metric: str, file: Path) -> tuple[pd.DataFrame, str]:
    """The published figures of paper.csv beside ours, where all of a row's settings are met, and how the orders agree.

    Raises:
        ValueError: the file cannot be read, lacks a column, or has a value that is no number.
    """
    try:
        paper = pd.read_csv(file, dtype=str).fillna("")
        if "value" in paper:
            paper["value"].astype(float)
    except ValueError as error:
        raise ValueError(
            f"{file}: {error}; it is a table of comma-separated values with the figures in `value`"
        ) from None
    if missing := [column for column in PAPER if column not in paper]:
        raise ValueError(f"{file} has no column {missing[0]}; it needs {', '.join(PAPER)} and one for each setting")
    keys, rows = [column for column in paper if column not in PAPER], []
    done = [run for run in runs if run.state == "done"]
    for _, line in paper.iterrows():
        same = [run for run in done if all(run.setting(key) == line[key] for key in keys if line[key])]
        if same:
            rows.append({**line, "ours": mean(same, metric), "runs": len(same)})
    frame = pd.DataFrame(rows)
    if len(frame) < 3:
        return frame, "fewer than three settings are in both"
    theirs, ours = frame["value"].astype(float), frame["ours"]
    rho = stats.spearmanr(theirs, ours if not higher_is_better(metric) else -ours).statistic
    protocols = " and ".join(dict.fromkeys(frame["metric"] + " by " + frame["protocol"]))
    return frame, (
        f"The figures are of different kinds ({protocols}; ours is {metric}), so only their order can be compared: "
        f"rank correlation {rho:.2f} over {len(frame)} settings."
    )


def evaluations(runs: Sequence[Run]) -> pd.DataFrame:
    """Figures with their protocols; last, what keeps a row from being compared with the first of its seed and size.

    Ways of drawing samples do not, where each network was sampled in several, which are then what is compared.
    """
    results = [(evaluated_run(run, result), result) for run in runs for result in run.evaluations]
    rows, keys, firsts = [], varied([run for run, _ in results]), dict[tuple[int, str], Protocol]()
    compared = ("drawing.",) if evaluated(runs) else ()
    for run, result in results:
        drawn, size = result.protocol.drawing, size_text(result.protocol.size)
        differing = differences(firsts.setdefault((run.seed, size), result.protocol), result.protocol)
        row = {**{key: run.setting(key) for key in keys}, "seed": run.seed}
        row |= {"size": size, "drawn": drawn.summary(), **result.figures, "protocol": result.protocol.name}
        rows.append({**row, "differs in": ", ".join(key for key in differing if not key.startswith(compared))})
    return pd.DataFrame(rows)


def jobs(runs: Sequence[Run]) -> pd.DataFrame:
    """A row for each run: how it stands, and why it failed."""
    return pd.DataFrame({
        "run": [run.folder.name for run in runs],
        "state": [run.state for run in runs],
        "images": [run.progress for run in runs],
        "loss": [run.last("train/loss") for run in runs],
        "images/s": [float(run.values("perf/images_per_s").median()) for run in runs],
        "reason": [run.reason for run in runs],
    })  # fmt: skip


def rounded(frame: pd.DataFrame) -> pd.DataFrame:
    """For readers: a mean and its interval in one cell, four digits of other numbers."""
    shown = pd.DataFrame(index=frame.index)
    for column in frame:
        if column.endswith(" +-"):
            continue
        widths = frame.get(f"{column} +-", [float("nan")] * len(frame))
        shown[column] = [_cell(value, width) for value, width in zip(frame[column], widths, strict=True)]
    return shown


def _cell(value: object, width: float) -> str:
    if not isinstance(value, float):
        return str(value)
    if np.isnan(value):
        return ""
    return f"{value:.4g}" if np.isnan(width) else f"{value:.4g} ± {width:.2g}"


def markdown(frame: pd.DataFrame) -> str:
    """A table of Markdown."""
    lines = [list(frame.columns), ["---"] * len(frame.columns), *frame.to_numpy().tolist()]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"
