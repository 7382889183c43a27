from __future__ import annotations

import math

import pytest
import torch

from genfound.layers.embed import LabelEmbedder, TimestepEmbedder, sinusoid


@pytest.mark.parametrize("size", [6, 256])
def test_sinusoid_is_the_published_formula(size: int) -> None:
    half = size // 2
    t = [0.0, 0.3, 1.0, 999.0]
    angles = [[time * math.exp(-math.log(10_000) * k / half) for k in range(half)] for time in t]
    expected = [[math.cos(a) for a in row] + [math.sin(a) for a in row] for row in angles]
    torch.testing.assert_close(sinusoid(torch.tensor(t), size), torch.tensor(expected), atol=1e-4, rtol=1e-5)


def test_an_odd_size_ends_in_a_zero_column() -> None:
    odd = sinusoid(torch.tensor([0.2, 0.9]), 7)
    assert torch.equal(odd[:, :6], sinusoid(torch.tensor([0.2, 0.9]), 6))
    assert odd[:, 6].tolist() == [0, 0]


def test_sinusoid_is_float32_for_any_time() -> None:
    for dtype in (torch.int64, torch.float64, torch.bfloat16):
        embedded = sinusoid(torch.tensor([0, 1], dtype=dtype))
        assert embedded.dtype == torch.float32
        torch.testing.assert_close(embedded, sinusoid(torch.tensor([0.0, 1.0])))


def test_times_are_not_rescaled() -> None:
    torch.testing.assert_close(sinusoid(torch.tensor([0.5]))[0, 0], torch.tensor(math.cos(0.5)))


def test_time_embedding_tells_times_apart() -> None:
    embed = TimestepEmbedder(16)
    out = embed(torch.tensor([0.0, 0.5, 0.5, 1.0]))
    assert out.shape == (4, 16)
    assert torch.equal(out[1], out[2])
    assert (out[0] - out[1]).abs().max() > 1e-3
    assert (out[1] - out[3]).abs().max() > 1e-3


@pytest.mark.parametrize("null_class", [True, False])
def test_the_label_table_has_a_null_row_where_wanted(null_class: bool) -> None:
    embed = LabelEmbedder(10, 4, null_class=null_class)
    assert embed.embedding_table.weight.shape == (10 + null_class, 4)
    assert torch.equal(embed(torch.tensor([3, 9])), embed.embedding_table.weight[[3, 9]])
    if null_class:
        assert torch.equal(embed(torch.tensor([10]))[0], embed.embedding_table.weight[10])
    else:
        with pytest.raises(IndexError):
            embed(torch.tensor([10]))
