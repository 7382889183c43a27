from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genfound.batch import Batch
from tests.helpers import latents, packed, three_layouts

SIZES = [(3, 5), (4, 4), (1, 7), (1, 1)]
SQUARES = [(4, 4)] * 4


def naive_means(sizes: list[tuple[int, int]]) -> torch.Tensor:
    return torch.stack([z.square().mean() for z in latents(sizes)])


@pytest.mark.parametrize("sizes", [SIZES, SQUARES], ids=["ragged", "square"])
def test_per_image_is_the_mean_over_own_elements_in_every_layout(sizes: list[tuple[int, int]]) -> None:
    for batch in three_layouts(sizes).values():
        own = batch.per_image(batch.x**2)
        torch.testing.assert_close(own[batch.real], naive_means(sizes))
        assert (own[~batch.real] == 0).all()


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=5))
def test_per_image_property(sizes: list[tuple[int, int]]) -> None:
    for batch in three_layouts(sizes).values():
        torch.testing.assert_close(batch.per_image(batch.x**2)[batch.real], naive_means(sizes))


def test_filler_does_not_reach_any_image_even_if_not_finite() -> None:
    batch = packed(SIZES, max_tokens=60, max_images=9)
    dirty = batch.x.clone()
    dirty[39:] = float("nan")
    means = batch.per_image(dirty**2)
    torch.testing.assert_close(means[:4], naive_means(SIZES))
    assert (means[4:] == 0).all()


def test_gradient_of_per_image_matches_the_naive_one() -> None:
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0])
    expected = torch.cat(
        [(2 * z * w / z.numel()).flatten(1).T for z, w in zip(latents(SIZES), weights, strict=True)]
    )  # (T, C)
    batch = packed(SIZES)
    x = batch.x.clone().requires_grad_()
    (batch.per_image(x**2) * weights).sum().backward()
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("sizes", [SIZES, SQUARES], ids=["ragged", "square"])
def test_expand_gives_each_element_the_value_of_its_image(sizes: list[tuple[int, int]]) -> None:
    for batch in three_layouts(sizes).values():
        values = torch.arange(1.0, len(batch.y) + 1)
        spread = (torch.ones_like(batch.x) * batch.expand(values)).square()
        expected = torch.where(batch.real, values**2, 0.0)
        torch.testing.assert_close(batch.per_image(spread), expected)


def test_per_token_gives_each_token_the_vector_of_its_image() -> None:
    batch = packed(SIZES)
    vectors = torch.randn(4, 6)
    expected = torch.cat([v.expand(h * w, 6) for v, (h, w) in zip(vectors, SIZES, strict=True)])
    assert torch.equal(batch.per_token(vectors), expected)
    for name, other in three_layouts(SQUARES).items():
        if not name.startswith("packed"):
            assert torch.equal(other.per_token(vectors), vectors[:, None])


def test_positions_count_from_zero_in_every_row() -> None:
    batch = packed([(2, 3), (1, 1), (2, 2)], max_tokens=14, max_images=4)
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 5, 0, 0, 1, 2, 3, 0, 1, 2]


def test_tokens_and_slots() -> None:
    batches = three_layouts(SIZES, patch_size=1)
    for name, batch in batches.items():
        assert batch.tokens[batch.real].tolist() == [15, 16, 7, 1], name
        assert batch.layout == name[:-1]
    assert batches["padded0"].slots == 4 * 16
    assert batches["padded1"].slots == 4 * 19
    assert batches["packed2"].slots == 39
    assert batches["packed3"].slots == 200
    assert three_layouts(SQUARES)["dense4"].slots == 64


@pytest.mark.parametrize("sizes", [SIZES, SQUARES], ids=["ragged", "square"])
def test_join_is_one_batch_after_the_other(sizes: list[tuple[int, int]]) -> None:
    for batch in three_layouts(sizes).values():
        other = replace(batch, x=2 * batch.x, y=batch.y + 5)
        both = batch.join(other)
        assert torch.equal(both.y, torch.cat([batch.y, batch.y + 5]))
        assert torch.equal(both.real, torch.cat([batch.real, batch.real]))
        assert torch.equal(both.tokens, torch.cat([batch.tokens, batch.tokens]))
        means = both.per_image(both.x**2)
        own = batch.per_image(batch.x**2)
        torch.testing.assert_close(means, torch.cat([own, 4 * own]))
        values = torch.arange(float(len(both.y)))
        spread = both.per_image(torch.ones_like(both.x) * both.expand(values))
        torch.testing.assert_close(spread, torch.where(both.real, values, 0.0))


def test_join_of_packed_equals_packing_at_once() -> None:
    a, b = packed(SIZES[:2]), packed(SIZES[2:])
    joined = a.join(replace(b, y=b.y + 2))
    at_once = packed(SIZES)
    assert torch.equal(joined.cu_seqlens, at_once.cu_seqlens)
    assert joined.cu_seqlens.dtype == torch.int32
    assert torch.equal(joined.image_of, at_once.image_of)
    assert torch.equal(joined.positions, at_once.positions)
    assert (joined.max_seqlen, joined.sides) == (at_once.max_seqlen, at_once.sides)
    assert torch.equal(joined.sizes, at_once.sizes)


def test_join_refuses_another_layout() -> None:
    batches = three_layouts(SQUARES)
    with pytest.raises(AssertionError):
        batches["dense4"].join(batches["packed2"])


def test_to_moves_every_tensor_and_nothing_else() -> None:
    batch = packed(SIZES, max_tokens=60, max_images=9)
    moved = batch.to("meta")
    for name in ("x", "y", "sizes", "real", "image_of", "cu_seqlens"):
        assert getattr(moved, name).device.type == "meta", name
        assert getattr(moved, name).shape == getattr(batch, name).shape
    assert (moved.mask, moved.max_seqlen) == (None, batch.max_seqlen)


def test_a_batch_cannot_be_changed_in_place() -> None:
    batch = packed(SIZES)
    with pytest.raises(AttributeError):
        batch.y = batch.y + 1  # type: ignore[misc]
    assert isinstance(batch, Batch)


def test_text_is_filled_up_to_one_length_and_joined() -> None:
    batch = packed([(2, 2), (1, 3)], max_tokens=12, max_images=3, filler_label=7)
    texts = [torch.ones(2, 5), torch.full((4, 5), 2.0)]
    told = batch.with_text(texts, 4)
    assert told.text is not None and told.text_tokens is not None
    assert told.text.shape == (4, 4, 5) and told.text_tokens.tolist() == [2, 4, 0, 0]
    assert torch.equal(told.text[0, :2], texts[0]) and torch.equal(told.text[1], texts[1])
    assert (told.text[0, 2:] == 0).all() and (told.text[2:] == 0).all()
    both = told.join(told)
    assert both.text is not None and both.text_tokens is not None
    assert both.text_tokens.tolist() == [2, 4, 0, 0] * 2 and torch.equal(both.text, torch.cat([told.text] * 2))
    assert batch.join(batch).text is None
    with pytest.raises(RuntimeError):
        batch.with_text([torch.ones(5, 5)], 4)
