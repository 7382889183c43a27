"""The golden runner notices what is off, and never passes what nothing has run."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.golden.adapters import ADAPTERS
from tests.golden.compare import differences, tolerance
from tests.golden.fill import parameter, unit
from tests.golden.runner import COMMITTED, fixture_files, read, run

ROOT = Path(__file__).parents[1]
FILES = {str(file.relative_to(COMMITTED).with_suffix("")): file for file in fixture_files(COMMITTED)}


def forward() -> dict[str, Any]:
    return read(FILES["nit/forward_square"])


def one_of_each_kind() -> list[str]:
    """The first fixture of each kind that has numbers, but not statistics of what is drawn, which are less exact."""
    kinds: dict[tuple[str, str], str] = {}
    for name, file in FILES.items():
        fixture = read(file)
        if fixture["kind"] != "init" and any(
            isinstance(e, dict) and e.get("abs_max") and "values" in e for e in fixture.get("outputs", {}).values()
        ):
            kinds.setdefault((fixture["topic"], fixture["kind"]), name)
    return list(kinds.values())


@pytest.mark.parametrize("name", one_of_each_kind())
def test_one_number_that_is_off_by_one_percent_of_the_largest_fails(name: str) -> None:
    fixture = read(FILES[name])
    adapter = ADAPTERS[fixture["topic"], fixture["kind"]]
    results = adapter.run(fixture)
    for output, entry in fixture["outputs"].items():
        if not isinstance(entry, dict) or not entry.get("abs_max") or "values" not in entry:
            continue
        for part in ("values", *(entry.keys() & {"mean", "std", "abs_max"})):
            changed = copy.deepcopy(fixture)
            wrong = changed["outputs"][output]
            if part == "values":
                wrong["values"][len(wrong["values"]) // 2] += 0.01 * entry["abs_max"]
            else:
                wrong[part] += 0.01 * entry["abs_max"]
            if output not in adapter.notes:
                found = differences(changed, results, adapter.notes)
                assert any(line.startswith(f"{output}: ") for line in found), output
            elif part == "values":  # the adapter itself compares it
                with pytest.raises(AssertionError):
                    adapter.run(changed)


def test_such_a_fixture_fails_in_the_runner() -> None:
    fixture = forward()
    fixture["outputs"]["zs.0"]["values"][7] += 0.01 * fixture["outputs"]["zs.0"]["abs_max"]
    with pytest.raises(pytest.fail.Exception, match=r"(?m)^zs\.0: value"):
        run(fixture)
    run(forward())


def test_every_exact_output_is_compared() -> None:
    for name in ("nit/parameter_counts_S", "nit/initialisation", "nit/rope_normal"):
        fixture = read(FILES[name])
        exact = [key for key, entry in fixture["outputs"].items() if "exact" in entry]
        assert exact
        for key in exact:
            changed = copy.deepcopy(fixture)
            wanted = changed["outputs"][key]["exact"]
            if isinstance(wanted, dict):
                wanted["total"] += 1
            else:
                wanted[-1] = "something else"
            with pytest.raises(pytest.fail.Exception, match=rf"(?m)^{key}: "):
                run(changed)


def test_a_crop_with_another_checksum_fails() -> None:
    fixture = read(FILES["data/crop_no_box"])
    fixture["outputs"]["crc32"] += 1
    with pytest.raises(pytest.fail.Exception, match="crc32: is"):
        run(fixture)


def test_another_option_or_weight_fails() -> None:
    options, weights = forward(), forward()
    options["config"]["theta"] = 9_000
    weights["parameters"] = [[key.replace("qkv", "kqv"), shape] for key, shape in weights["parameters"]]
    with pytest.raises(pytest.fail.Exception, match=r"(?m)^out: value"):
        run(options)
    with pytest.raises(ValueError, match=r"missing \(blocks\.0\.attn\.qkv\.bias"):
        run(weights)


def test_an_output_that_no_adapter_computes_fails() -> None:
    fixture = forward()
    fixture["outputs"]["attention_map"] = {"exact": 1}
    with pytest.raises(pytest.fail.Exception, match="attention_map: not computed"):
        run(fixture)


def test_an_option_that_is_not_supported_fails() -> None:
    fixture = forward()
    fixture["config"]["surprise"] = True
    with pytest.raises(pytest.fail.Exception, match=r"unknown arguments \['surprise'\]"):
        run(fixture)


@pytest.mark.parametrize("topic_kind", [("nit", "nit_dream"), ("dream", "nit_forward")])
def test_a_required_fixture_without_an_adapter_fails(topic_kind: tuple[str, str]) -> None:
    fixture = {**forward(), "topic": topic_kind[0], "kind": topic_kind[1]}
    with pytest.raises(pytest.fail.Exception, match="a required fixture without an adapter"):
        run(fixture)


@pytest.mark.parametrize("level", ["aid", "later"])
def test_an_aid_without_an_adapter_is_an_expected_failure(level: str) -> None:
    with pytest.raises(pytest.xfail.Exception, match=f"{level}, topic nit, kind nit_dream"):
        run({**forward(), "kind": "nit_dream", "level": level})


def test_a_part_with_an_adapter_must_pass() -> None:
    fixture = {**forward(), "level": "aid"}
    fixture["outputs"]["out"]["values"][0] += 1
    with pytest.raises(pytest.fail.Exception, match=r"(?m)^out: value 0 is"):
        run(fixture)


def numbers(values: list[float], **entry: Any) -> dict[str, Any]:
    a = np.array(values)
    summaries = {"mean": a.mean(), "std": a.std(), "abs_max": np.abs(a).max()}
    return {"outputs": {"x": {"shape": [len(a)], "stride": 1, "values": values, **summaries}}, **entry}


@pytest.mark.parametrize(
    ("entry", "allowed"),
    [
        ({}, 2e-4),
        ({"tolerance": 0.03}, 0.06),
        ({"noise_floor": {"x": 1e-5}}, 2e-4),
        ({"noise_floor": {"x": 1e-9}}, 6e-6),
        ({"noise_floor": {"other": 1e-3}}, 2e-4),
        ({"noise_floor": 1e-3}, 2e-2),
    ],
)
def test_tolerances(entry: dict[str, Any], allowed: float) -> None:
    fixture = numbers([-2.0, 1.0, 0.5], **entry)
    assert tolerance(fixture, "x", 2.0) == pytest.approx(allowed)
    assert differences(fixture, {"x": np.array([-2.0, 1.0, 0.5 + 0.9 * allowed])}) == []
    assert len(differences(fixture, {"x": np.array([-2.0, 1.0, 0.5 + 1.1 * allowed])})) == 1


@pytest.mark.parametrize(
    "result", [[np.nan, 1.0, 0.5], [-2.0, 1.0], [[-2.0, 1.0, 0.5]], [-2.0, np.inf, 0.5], [1.0, -2.0, 0.5]]
)
def test_wrong_numbers_are_wrong(result: Any) -> None:
    assert differences(numbers([-2.0, 1.0, 0.5]), {"x": np.array(result)})


def test_gradients_and_tables_are_outputs_too() -> None:
    entry = {"values": [1.0], "shape": [1]}
    fixture = {"outputs": {}, "gradients": {"w": entry}, "rows": [{"name": "S", "total": 5}]}
    assert differences(fixture, {}) == ["gradients.w: not computed", "rows: not computed"]
    good = {"gradients.w": np.ones(1), "rows": [{"name": "S", "total": 5}]}
    assert differences(fixture, good) == []
    assert len(differences(fixture, {"gradients.w": np.zeros(1), "rows": [{"name": "S", "total": 6}]})) == 2


@pytest.mark.parametrize(
    ("wanted", "good", "bad"),
    [
        (7, 7, 8), ("linear", "linear", "cosine"), (True, True, 1), ([1, 2], (1, 2), [2, 1]), (0.5, 0.50001, 0.51),
        ([0.5, -4.0], np.array([0.5001, -4.0]), np.array([0.51, -4.0])), ({"exact": [["a", 0.1]]}, [["a", 0.1]], []),
        ({"value": 24}, 24, 25), ({"shape": [2], "values": [3, 4], "dtype": "int64"}, np.array([3, 4]), [3, 5]),
        ({"shape": [4], "stride": 3, "values": [1.0, 4.0]}, np.arange(1.0, 5.0), np.arange(4.0)),
        ({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}}),
    ],
)  # fmt: skip
def test_other_forms_of_outputs(wanted: Any, good: Any, bad: Any) -> None:
    fixture = {"outputs": {"x": wanted}}
    assert differences(fixture, {"x": good}) == []
    assert len(differences(fixture, {"x": bad})) == 1


def test_filled_numbers() -> None:
    values = unit("input.x", (100_000,)).astype(np.float64)
    assert abs(values.mean()) < 0.01
    assert abs(values.std() - 1) < 0.01
    assert np.abs(values).max() <= 3**0.5
    np.testing.assert_allclose(unit("input.x", (2, 2)), [[-1.2923555, -0.41925973], [1.3548915, -1.1725399]], rtol=1e-6)
    assert parameter("a.weight", (40, 5)).std() == pytest.approx(5**-0.5, rel=0.2)
    assert abs(parameter("norm.weight", (500,)).mean() - 1) < 0.02
    assert abs(parameter("a.bias", (500,)).mean()) < 0.02


@pytest.mark.slow
def test_the_command_runs_another_folder_and_lists_the_rest(tmp_path: Path) -> None:
    good = forward()
    for name, change in (("good", {}), ("unknown", {"kind": "a"}), ("part", {"kind": "b", "level": "aid"})):
        (tmp_path / "deep" / name).mkdir(parents=True)
        (tmp_path / "deep" / name / f"{name}.json").write_text(json.dumps({**good, **change}))
    command = [sys.executable, "-m", "pytest", "tests/golden", "--golden-dir", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 failed, 1 passed, 1 xfailed" in done.stdout
    assert "deep/part/part: aid, topic nit, kind b" in done.stdout
    assert "a required fixture without an adapter: topic nit, kind a" in done.stdout
