import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from genfound.evaluation.protocol import (
    LIBRARIES,
    RESULTS,
    Protocol,
    Result,
    SamplingRecord,
    differences,
    read_results,
    table,
)
from genfound.loggers.provenance import versions

DRAWING = SamplingRecord(
    weights="ema",
    sampler={"name": "heun", "steps": 20},
    guidance={"name": "cfg", "scale": 1.5, "interval": [0.0, 0.7], "channels": "all"},
    rope=None,
    batch=None,
    labels="random",
    seed=0,
    precision="32-true",
    decoder={"name": "SdVae", "hash": "abc"},
    uint8="round",
    versions={"torch": "2.6"},
)
PROTOCOL = Protocol(
    name="adm_50k",
    altered=[],
    count=50_000,
    size=[256, 256],
    drawing=DRAWING,
    extractor={"name": "inception", "hash": "123"},
    convention="adm",
    reference={"from": "ref.npz", "hash": "456", "size": [256, 256]},
    versions={"torch": "2.6"},
)


def result(fid: float = 2.27, protocol: Protocol = PROTOCOL, **subject: Any) -> Result:
    return Result({"fid": fid, "recall": 0.57}, protocol, {"from": "runs/x", "hash": "f00", **subject}, {"time": "now"})


def test_protocols_agree_until_a_field_differs() -> None:
    guided = replace(DRAWING, guidance={**DRAWING.guidance, "channels": "first3"})  # type: ignore[dict-item]
    other = replace(PROTOCOL, drawing=guided, count=10_000)
    assert differences(PROTOCOL, PROTOCOL) == []
    assert differences(PROTOCOL, other) == ["count", "drawing.guidance.channels"]


def test_a_name_and_a_path_are_no_difference_and_a_hash_is() -> None:
    moved = replace(PROTOCOL, name="mine", reference={**PROTOCOL.reference, "from": "elsewhere.npz"})
    assert differences(PROTOCOL, moved) == []
    other = replace(PROTOCOL, reference={**PROTOCOL.reference, "hash": "789"})
    assert differences(PROTOCOL, other) == ["reference.hash"]


def test_an_option_that_one_of_them_lacks_is_a_difference() -> None:
    sampler = replace(DRAWING, sampler={"name": "heun", "steps": 20, "shift": 1.0})
    assert differences(PROTOCOL, replace(PROTOCOL, drawing=sampler)) == ["drawing.sampler.shift"]


def test_what_is_unknown_agrees_with_nothing() -> None:
    unknown = replace(PROTOCOL, drawing=SamplingRecord.unknown(), count=10_000)
    assert differences(PROTOCOL, unknown) == ["count", "drawing (unknown)"]
    assert differences(unknown, unknown) == ["drawing (unknown)"]


def test_every_field_is_printed() -> None:
    text = "\n".join(result().lines())
    for told in (
        "fid 2.27", "recall 0.57", "adm_50k", "50,000 samples of 256x256", "labels random", "seed 0", "weights ema",
        "heun, steps 20", "cfg, scale 1.5, interval [0.0, 0.7], channels all", "SdVae, hash abc", "uint8 round",
        "inception, hash 123", "ref.npz, hash 456", "torch 2.6", "runs/x, hash f00",
    ):  # fmt: skip
        assert told in text
    assert "adm_50k, but for n, seed" in "\n".join(replace(PROTOCOL, altered=["n", "seed"]).lines())


def test_results_are_stored_and_read_again(tmp_path: Path) -> None:
    results = [result(2.27), result(2.3, replace(PROTOCOL, count=10_000))]
    for one in results:
        one.append_to(tmp_path / "evaluations")
    replace(results[0], provenance={"time": "later"}).append_to(tmp_path / "evaluations")  # measured again
    again = read_results(tmp_path)
    assert again == results == read_results(tmp_path / "evaluations" / RESULTS)
    assert differences(again[0].protocol, results[0].protocol) == []
    line = json.loads((tmp_path / "evaluations" / RESULTS).read_text().splitlines()[0])
    assert line["protocol"]["drawing"]["guidance"]["scale"] == 1.5


def test_a_figure_without_a_protocol_cannot_be_made_or_read(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        Result(figures={"fid": 2.27})  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        SamplingRecord(weights="ema")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="a result needs figures"):
        result("2.27")  # type: ignore[arg-type]
    result().append_to(tmp_path)
    line = json.loads((tmp_path / RESULTS).read_text())
    del line["protocol"]["drawing"]["seed"]
    (tmp_path / RESULTS).write_text(json.dumps(line))
    with pytest.raises(ValueError, match="holds a line that is not a result"):
        read_results(tmp_path)
    with pytest.raises(FileNotFoundError, match="there are no results"):
        read_results(tmp_path / "absent")


def test_the_table_says_which_field_differs() -> None:
    results = [result(), result(2.5, **{"from": "runs/y"}), result(3.0, replace(PROTOCOL, convention="torch_fidelity"))]
    rows = table(results)
    assert rows[0].split() == ["fid", "recall", "protocol"]
    assert rows[1].endswith("adm_50k") and rows[2].endswith("the same")
    assert rows[3].endswith("differs: convention")


def test_the_libraries_that_change_figures_are_recorded() -> None:
    assert {"torch", "numpy", "pillow", "genfound"} <= versions(*LIBRARIES, "no such package").keys()


def test_of_a_weaker_network_the_hash_counts_and_not_its_place() -> None:
    guidance = {"name": "autoguidance", "weights": "runs/a", "hash": "1"}
    one, moved, other = (
        replace(PROTOCOL, drawing=replace(DRAWING, guidance={**guidance, **more}))
        for more in ({}, {"weights": "b"}, {"hash": "2"})
    )
    assert differences(one, moved) == []
    assert differences(one, other) == ["drawing.guidance.hash"]


def test_the_rule_by_which_a_reference_was_found_is_no_difference() -> None:
    found = replace(PROTOCOL, reference={**PROTOCOL.reference, "rule": "of this size"})
    assert differences(PROTOCOL, found) == []


def test_rope_and_the_images_of_a_call_are_differences_and_are_printed() -> None:
    changed = replace(PROTOCOL, drawing=replace(DRAWING, rope={"rule": "yarn"}, batch=16))
    assert differences(PROTOCOL, changed) == ["drawing.batch", "drawing.rope.rule"]
    text = "\n".join(changed.lines())
    assert "steps 20, 16 images together" in text and "rope rule yarn" in text
    assert changed.drawing.summary() == f"{DRAWING.summary()}, rope rule yarn"


@pytest.mark.parametrize("note", [None, [1], 3.0, {"seed": 0}, {**asdict(DRAWING), "more": 1}])
def test_a_making_that_is_not_told_whole_is_unknown(note: object) -> None:
    assert SamplingRecord.from_note(note) == SamplingRecord.unknown()
    assert SamplingRecord.from_note(asdict(DRAWING)) == DRAWING


def test_the_order_of_samples_is_a_difference_where_a_figure_depends_on_it() -> None:
    by_content = replace(PROTOCOL, order="by content")
    assert differences(PROTOCOL, by_content) == ["order"]
    assert differences(*(replace(p, count=5000) for p in (PROTOCOL, by_content))) == []
    assert "order by content" in "\n".join(by_content.lines())


def test_a_result_that_does_not_tell_the_order_was_measured_as_stored(tmp_path: Path) -> None:
    line = json.loads(json.dumps(asdict(result())))
    del line["protocol"]["order"]
    (tmp_path / RESULTS).write_text(json.dumps(line) + "\n")
    assert read_results(tmp_path)[0].protocol.order == "as stored"


def test_what_was_ignored_beside_a_reference_is_no_difference() -> None:
    found = replace(PROTOCOL, reference={**PROTOCOL.reference, "ignored": "2 .txt"})
    assert differences(PROTOCOL, found) == []
