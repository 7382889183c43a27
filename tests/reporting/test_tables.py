"""Tables of a study beside the same figures by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from genfound.reporting import tables
from genfound.reporting.collect import Run, metric_names, read_study, varied
from tests.evaluation.test_protocol import PROTOCOL, result
from tests.reporting.studies import made_run, made_study

METRIC = "val/velocity_mse_ema"
T_2 = 4.302653
"""Student's t of 95 % with two degrees of freedom."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    return read_study(made_study(tmp_path_factory.mktemp("runs") / "study"))


def test_only_what_differs_is_a_column(runs: list[Run]) -> None:
    assert varied(runs) == ["objective.path"]
    assert metric_names(runs, [METRIC, "eval", "train/loss_t"]) == [
        METRIC, "train/loss_t/0.00-0.50", "train/loss_t/0.50-1.00",
    ]  # fmt: skip


def test_means_and_intervals_are_those_of_the_seeds(runs: list[Run]) -> None:
    frame = tables.summary(runs, [METRIC]).set_index("objective.path")
    assert list(frame.index) == ["gvp", "linear", "vp"]
    assert frame["done"].to_dict() == {"gvp": "3 of 3", "linear": "3 of 3", "vp": "0 of 1"}
    assert frame.loc["linear", METRIC] == pytest.approx(1.5)
    assert frame.loc["linear", f"{METRIC} +-"] == pytest.approx(T_2 * 0.5 / 3**0.5, rel=1e-6)
    assert frame.loc["gvp", METRIC] == pytest.approx(1.3)


def test_a_seed_that_was_trained_twice_is_one_seed(runs: list[Run]) -> None:
    frames = [tables.summary(some, [METRIC]).drop(columns="done") for some in (runs, [*runs, *runs[:2]])]
    pd.testing.assert_frame_equal(*frames)


def test_effects_are_paired_by_seed(runs: list[Run]) -> None:
    (effect,) = tables.effects(runs, METRIC).to_dict("records")
    assert (effect["from"], effect["to"], effect["pairs"]) == ("linear", "gvp", 3)
    assert effect["effect"] == pytest.approx(-0.2)
    assert effect["effect +-"] == pytest.approx(T_2 * 0.1 / 3**0.5, rel=1e-6)
    assert effect["relative"] == pytest.approx(-0.2 / 1.5)
    assert effect["detectable"] == pytest.approx((T_2 + 1.060660) * 0.1 / 3**0.5, rel=1e-5)
    assert (effect["verdict"], effect["where"]) == ("not told apart", "all")


def test_effects_are_told_for_each_value_of_what_else_varies(tmp_path: Path) -> None:
    ends = {("linear", "velocity"): 1.0, ("gvp", "velocity"): 0.9, ("linear", "score"): 2.0, ("gvp", "score"): 2.5}
    for (path, prediction), end in ends.items():
        overrides = [f"objective.path={path}", f"objective.prediction={prediction}"]
        made_run(tmp_path / f"s/{path}-{prediction}", overrides, {METRIC: [end]})
    frame = tables.effects(read_study(tmp_path / "s"), METRIC)
    found = {row["where"]: (row["pairs"], row["effect"]) for _, row in frame[:3].iterrows()}
    assert found == {
        "all": (2, pytest.approx(0.2)),
        "objective.prediction=velocity": (1, pytest.approx(-0.1)),
        "objective.prediction=score": (1, pytest.approx(0.5)),
    }


def test_a_verdict_knows_the_direction_of_its_metric() -> None:
    down = np.array([-0.21, -0.2, -0.19])
    assert tables.verdict(down, METRIC) == "better" and tables.verdict(-down, METRIC) == "worse"
    assert tables.verdict(down, "eval/recall@256") == "worse"
    assert tables.verdict(down[:1], METRIC) == "one pair"


def test_the_papers_figures_stand_beside_ours(runs: list[Run], tmp_path: Path) -> None:
    file = tmp_path / "paper.csv"
    file.write_text(
        "objective.path,metric,value,protocol,source\n"
        'linear,FID,34.8,50K ODE,"Table 1"\ngvp,FID,34.6,50K ODE,"Table 1"\nvp,FID,39.8,50K ODE,"Table 1"\n'
    )
    frame, remark = tables.beside_paper(runs, METRIC, file)
    assert frame[["objective.path", "value", "runs"]].to_numpy().tolist() == [["linear", "34.8", 3], ["gvp", "34.6", 3]]
    assert frame["ours"].tolist() == pytest.approx([1.5, 1.3])
    assert remark == "fewer than three settings are in both"
    file.write_text("objective.path,metric,value\nlinear,FID,34.8\n")
    with pytest.raises(
        ValueError, match=r"paper\.csv has no column protocol; it needs metric, value, protocol, source"
    ):
        tables.beside_paper(runs, METRIC, file)
    for text, reason in (("", "No columns"), ("metric,value,protocol,source\nfid,about 2,x,y\n", "could not convert")):
        file.write_text(text)
        with pytest.raises(ValueError, match=rf"paper\.csv: {reason}.*with the figures in `value`"):
            tables.beside_paper(runs, METRIC, file)


@pytest.mark.parametrize(("theirs", "rho"), [((3.0, 2.0, 4.0), "1.00"), ((4.0, 5.0, 3.0), "-1.00")])
def test_the_order_of_the_paper_is_compared(theirs: tuple[float, ...], rho: str, tmp_path: Path) -> None:
    for path, end in (("linear", 0.5), ("gvp", 0.4), ("vp", 0.6)):
        made_run(tmp_path / f"s/{path}", [f"objective.path={path}"], {METRIC: [end]})
    rows = zip(("linear", "gvp", "vp"), theirs, strict=True)
    lines = [f"{path},FID,{value},50K,Table 1\n" for path, value in rows]
    (tmp_path / "paper.csv").write_text("objective.path,metric,value,protocol,source\n" + "".join(lines))
    _, remark = tables.beside_paper(read_study(tmp_path / "s"), METRIC, tmp_path / "paper.csv")
    assert f"rank correlation {rho} over 3 settings" in remark and "FID by 50K; ours is val/velocity_mse_ema" in remark


def test_jobs_that_failed_are_listed_with_their_reason(runs: list[Run]) -> None:
    failed = tables.jobs(runs).iloc[-1]
    assert (failed["state"], failed["reason"]) == ("failed", "RuntimeError: no room <on> the disk")
    assert failed["images"] == "0 of 400"


def test_ways_of_sampling_keep_no_figures_from_being_compared_and_another_extractor_does(tmp_path: Path) -> None:
    for seed in (0, 1):
        network = tmp_path / f"networks/{seed}"
        made_run(network, ["model.depth=1", f"seed={seed}"], {})
        known = replace(PROTOCOL, reference={"hash": f"{seed}"})
        other = replace(known, extractor={"name": "inception", "hash": "456"})
        ways = [replace(known.drawing, guidance={"name": "cfg", "scale": scale}) for scale in (1.5, 2.5)]
        for protocol in (*(replace(known, drawing=way) for way in ways), other):
            result(protocol=protocol, **{"from": str(network)}).append_to(tmp_path / f"ways/{seed}")
    rows = tables.evaluations(read_study(tmp_path / "ways"))
    assert list(rows["seed"]) == [0, 0, 0, 1, 1, 1]  # of the networks; each has its own reference
    assert list(rows["differs in"]) == ["", "", "extractor.hash"] * 2
