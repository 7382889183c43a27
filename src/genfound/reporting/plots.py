"""Plots of a study, each as SVG: curves, cost, time bins, sizes, experts and speed."""

import io
from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from genfound.reporting.collect import Run, varied
from genfound.reporting.tables import by_setting, half_width, label, mean

TIME_BIN = "train/loss_t/"
LEGEND = 12
"""More lines than this have no legend."""


def _axes(x: str, y: str, width: float = 6.4) -> tuple[Figure, Axes]:
    figure, axes = plt.subplots(figsize=(width, 4.0), layout="constrained")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _plain(axis: Axis) -> None:
    """Plain numbers at the ticks of a logarithmic axis: at round ones where it has too few powers of ten."""
    low, high = axis.get_view_interval()
    if high < 30 * low:
        axis.set_major_locator(MaxNLocator(6))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _svg(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    plt.close(figure)
    return stream.getvalue()


def _finish(figure: Figure, axes: Axes, lines: int) -> bytes:
    if 1 < lines <= LEGEND:
        axes.legend(frameon=False, fontsize="small")
    return _svg(figure)


def curves(runs: Sequence[Run], metric: str) -> bytes | None:
    """A metric against images seen: a thin line for each seed, a thick one for their mean."""
    return _curves(metric, {key: [run.values(metric) for run in same] for key, same in by_setting(runs).items()})


def _curves(name: str, groups: Mapping[tuple[str, ...], Sequence[pd.Series]]) -> bytes | None:
    long = ((setting, [values for values in same if len(values) > 1]) for setting, same in groups.items())
    groups = {setting: same for setting, same in long if same}
    if not groups:
        return None
    figure, axes = _axes("images seen", name)
    for place, (setting, series) in enumerate(groups.items()):
        for values in series:
            axes.plot(values.index, values, color=f"C{place % 10}", alpha=0.35, linewidth=0.8)
        ends = min(values.index.max() for values in series)
        points = series[0].index[series[0].index <= ends]
        middle = np.mean([np.interp(points, values.index, values) for values in series], axis=0)
        axes.plot(points, middle, color=f"C{place % 10}", linewidth=2, marker=".", label=label(setting))
    if all((values > 0).all() for series in groups.values() for values in series):
        axes.set_yscale("log")
        _plain(axes.yaxis)
    return _finish(figure, axes, len(groups))


def against_cost(runs: Sequence[Run], metric: str) -> bytes | None:
    """A metric against the arithmetic of a forward pass for an image: a point with its interval for each setting."""
    points = []
    for setting, same in by_setting(runs).items():
        values = [run.last(metric) for run in same if run.state == "done" and np.isfinite(run.last(metric))]
        cost = mean(same, "perf/gflops_per_image")
        if values and np.isfinite(cost):
            points.append((setting, cost, float(np.mean(values)), half_width(values)))
    if len({cost for _, cost, _, _ in points}) < 2:
        return None
    figure, axes = _axes("Gflops of a forward pass for one image", metric)
    for place, (setting, cost, value, half) in enumerate(points):
        axes.errorbar(cost, value, half, fmt="o", color=f"C{place % 10}", capsize=3, label=label(setting))
    axes.set_xscale("log")
    _plain(axes.xaxis)
    return _finish(figure, axes, len(points))


def time_bins(runs: Sequence[Run]) -> bytes | None:
    """The training loss at the end, by time bin; comparable between runs of one path and prediction only."""
    names = sorted({column for run in runs for column in run.curve if column.startswith(TIME_BIN)})
    groups = {key: [run for run in same if run.state == "done"] for key, same in by_setting(runs).items()}
    groups = {key: same for key, same in groups.items() if same}
    if not names or not groups:
        return None
    figure, axes = _axes("time (0 data, 1 noise)", "train/loss, mean of the last tenth")
    for setting, same in groups.items():
        tails = {name: [run.values(name).tail(max(len(run.curve) // 10, 1)).mean() for run in same] for name in names}
        means = [np.mean(values) for values in tails.values()]
        axes.plot([name.removeprefix(TIME_BIN) for name in names], means, marker="o", label=label(setting))
    return _finish(figure, axes, len(groups))


def against(ways: Sequence[Run], metric: str, key: str) -> bytes:
    """A metric against one setting, as the size of samples: a line with its intervals for each setting of the rest."""
    place, groups = varied(ways).index(key), dict[tuple[str, ...], dict[str, list[float]]]()
    for setting, same in by_setting(ways).items():
        rest = (*setting[:place], *setting[place + 1 :])
        groups.setdefault(rest, {})[setting[place]] = [run.last(metric) for run in same]
    figure, axes = _axes("height x width of the samples" if key == "size" else key, metric)
    for rest, values in groups.items():
        means, halves = map(np.mean, values.values()), map(half_width, values.values())
        axes.errorbar([*values], [*means], [*halves], marker="o", capsize=3, label=label(rest))
    return _finish(figure, axes, len(groups))


def expert_load(runs: Sequence[Run]) -> bytes | None:
    """The largest load of an expert in any block against images seen; 1 / experts would be balanced."""
    groups = {setting: [_largest_load(run) for run in same] for setting, same in by_setting(runs).items()}
    return _curves("largest load of an expert", groups)


def _largest_load(run: Run) -> pd.Series:
    names = [column for column in run.curve if column.startswith("train/experts/") and column.endswith("/load_max")]
    return run.curve.set_index("images_seen")[names].max(axis=1).dropna() if names else pd.Series(dtype=float)


def speed(runs: Sequence[Run]) -> bytes | None:
    """Images per second of each setting, the median over a run."""
    groups = {key: [run.values("perf/images_per_s").median() for run in same] for key, same in by_setting(runs).items()}
    groups = {key: found for key, values in groups.items() if (found := [v for v in values if np.isfinite(v)])}
    if not groups:
        return None
    figure, axes = _axes("images per second", "")
    names = [label(key) for key in groups]
    axes.barh(names, [float(np.median(values)) for values in groups.values()], color="C0", alpha=0.7)
    axes.invert_yaxis()
    return _svg(figure)
