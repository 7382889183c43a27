from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._inductor import metrics

from benchmarks.official_forms import FAMILIES, Family, largest_difference, our_step, pair, their_step
from genfound.config import compose

SMALL = ("model.width=64", "model.depth=2", "model.heads=2")


def small(name: str) -> Family:
    """A family at a width of 64 and two blocks."""
    rank = ["model.adaln_rank=16"] if name == "fit" else []
    return replace(FAMILIES[name], overrides=(*FAMILIES[name].overrides, *SMALL, *rank))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_published_form_gives_the_same_numbers_and_trains(name: str) -> None:
    family = small(name)
    config = compose.compose("train", family.overrides)
    net, theirs, batch = pair(family, config)
    assert largest_difference(net, theirs, family.call, batch) < 2e-6
    before = largest_difference(net, theirs, family.call, batch)
    for step in (our_step(config, net, batch), their_step(theirs, family.call, batch)):
        next(step)
    assert largest_difference(net, theirs, family.call, batch) > 10 * before


KERNELS = {"nit": 63, "dit": 38, "fit": 64, "dit_moe": 59}
"""Generated for both passes of a compiled block, at most; every one reads and writes all tokens."""


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", FAMILIES)
def test_a_compiled_block_is_few_kernels_and_equal(name: str) -> None:
    family = small(name)
    net, _, batch = pair(family, compose.compose("train", family.overrides))
    t = torch.linspace(0.1, 0.9, len(batch.y))
    expected = net(batch, t)
    metrics.reset()
    net.compile_blocks()
    out = net(batch, t)
    out.square().sum().backward()
    assert 10 < metrics.generated_kernel_count <= KERNELS[name]
    torch.testing.assert_close(out, expected, atol=1e-6 * float(expected.detach().abs().max()), rtol=0)
