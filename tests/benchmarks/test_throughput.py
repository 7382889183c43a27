"""The benchmark of steps runs on small shapes, and what it compares is alike."""

import argparse

import pytest
import torch

from benchmarks import throughput
from benchmarks.timing import interleaved, medians, ratio

CPU = torch.device("cpu")
SMALL = argparse.Namespace(models="dit_tiny,nit_tiny", tokens=64, repeats=1)


def test_calls_take_turns_and_the_first_round_does_not_count() -> None:
    order: list[str] = []
    rounds = interleaved([lambda: order.append("a"), lambda: order.append("b")], 2)
    assert order == ["a", "b"] * 3 and len(rounds) == 2
    assert medians([[1, 4], [3, 6], [2, 9]]) == [2, 6] and ratio([[1, 4], [3, 6], [2, 9]], 1, 0) == 4


@pytest.mark.parametrize(("model", "tokens"), [("dit_tiny", 64), ("nit_tiny", 54)])
def test_a_step_has_the_images_of_its_model(model: str, tokens: int) -> None:
    made = throughput.training(CPU, model, 64, "fp32")
    net, batch = made.net, made.batch
    before = [parameter.clone() for parameter in net.parameters()]
    made.step()
    assert int(batch.tokens[batch.real].sum()) == tokens
    assert not all(map(torch.equal, before, net.parameters()))


@pytest.mark.slow
def test_sections_compare_what_is_alike() -> None:
    printed = {
        name: "\n".join(throughput.SECTIONS[name](CPU, SMALL))
        for name in ("attention", "rope", "phases", "layouts", "kernels")
    }
    assert "| loop |" in printed["attention"] and "aten::" in printed["kernels"]
    difference = printed["rope"].split("|")[-2]
    assert float(difference) < 1e-5 and printed["phases"].count("| fp32 |") == 2
    for words in ("| fitv2_tiny, native |", "| fitv2_tiny, 512 pixels |", "nit_tiny: packs of native sizes"):
        assert words in printed["layouts"]
