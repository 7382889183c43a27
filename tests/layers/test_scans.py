"""Orders of tokens, and convolutions of the grids that they see, in both layouts."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from genfound.layers.scans import ORDERS, Scans, depthwise
from tests.helpers import packed

SIZES = [(3, 5), (4, 4), (1, 7), (6, 2)]
CPU = torch.device("cpu")


def grid(tokens: Tensor, rows: int, columns: int, order: str) -> Tensor:
    """Tokens (N, ...) as rows and columns of the grid that an order sees, from row-major ones."""
    seen = tokens.unflatten(0, (rows, columns))
    seen = seen.transpose(0, 1) if "columns" in order else seen
    return seen.flip(0, 1) if "reversed" in order else seen


@pytest.mark.parametrize(("before", "after"), itertools.product(ORDERS, ORDERS))
def test_orders_are_read_off_a_grid(before: str, after: str) -> None:
    expected, start = [], 0
    for rows, columns in SIZES:
        own = torch.arange(rows * columns)
        seen, wanted = (grid(own, rows, columns, order).flatten() for order in (before, after))
        index = Scans.of_grid(rows, columns, CPU).between(before, after)
        assert torch.equal(seen[index], wanted)
        expected.append(index + start)
        start += rows * columns
    batch = packed(SIZES, max_tokens=70, max_images=6)
    index = Scans.of(batch, 1).between(before, after)
    assert torch.equal(index[:start], torch.cat(expected))
    assert torch.equal(index.sort().values, torch.arange(70))  # filler is permuted within itself
    assert (index[start:] >= start).all()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("size", [3, 5])
def test_convolutions_are_of_the_grid_that_an_order_sees(order: str, size: int) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 6, size, padding=size // 2, groups=6)
    images = [torch.randn(rows * columns, 6) for rows, columns in SIZES]
    expected = []
    for (rows, columns), image in zip(SIZES, images, strict=True):
        seen = grid(image, rows, columns, order)
        expected.append(conv(seen.permute(2, 0, 1)[None])[0].flatten(1).mT)
        dense = depthwise(conv, seen.flatten(0, 1)[None], Scans.of_grid(rows, columns, CPU).grid(order, size))
        torch.testing.assert_close(dense[0], expected[-1])
    batch = packed(SIZES, max_tokens=70, max_images=6)
    scans, tokens = Scans.of(batch, 1), torch.cat([*images, torch.randn(70 - sum(map(len, images)), 6)])
    found = depthwise(conv, scans.reorder(tokens, ORDERS[0], order), scans.grid(order, size))
    torch.testing.assert_close(found[: sum(map(len, images))], torch.cat(expected))
