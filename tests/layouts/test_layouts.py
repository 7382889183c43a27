from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genfound import build
from genfound.layers.tokens import from_tokens, to_tokens
from genfound.layouts import Dense, Packed, Padded
from genfound.layouts.base import token_sizes
from tests.helpers import composed, latents

Sizes = list[tuple[int, int]]
RAGGED = st.lists(st.tuples(st.integers(1, 7), st.integers(1, 7)), min_size=1, max_size=6)
PATCHES = st.sampled_from([1, 2, 3])


def scaled(sizes: Sizes, patch: int) -> Sizes:
    return [(h * patch, w * patch) for h, w in sizes]


def assert_round_trip(layout: Dense | Padded | Packed, sizes: Sizes) -> None:
    z = latents(sizes, channels=3)
    batch = layout.to_batch(z, torch.arange(len(z)))
    back = layout.to_latents(batch.x, batch)
    assert len(back) == len(z)
    for before, after in zip(z, back, strict=True):
        assert torch.equal(before, after)
    assert batch.y[batch.real].tolist() == list(range(len(z)))
    p = layout.patch_size
    assert batch.sizes[batch.real].tolist() == [[h // p, w // p] for h, w in sizes]


@settings(max_examples=40)
@given(RAGGED, PATCHES)
def test_ragged_round_trip(sizes: Sizes, patch: int) -> None:
    for layout in (Padded(patch), Padded(patch, 60), Packed(patch), Packed(patch, 300, 8)):
        assert_round_trip(layout, scaled(sizes, patch))


@settings(max_examples=20)
@given(st.tuples(st.integers(1, 7), st.integers(1, 7)), st.integers(1, 5), PATCHES)
def test_dense_round_trip(size: tuple[int, int], count: int, patch: int) -> None:
    assert_round_trip(Dense(patch), scaled([size], patch) * count)


def test_tokens_are_row_major_and_their_values_channel_major() -> None:
    z = torch.arange(2 * 4 * 6).reshape(2, 4, 6)
    tokens = to_tokens(z, 2)
    assert tokens.shape == (6, 8)
    assert torch.equal(tokens[4], z[:, 2:4, 2:4].flatten())  # second row, second column
    assert torch.equal(from_tokens(tokens, 2, 2), z)


def test_token_sizes_of_no_image() -> None:
    assert token_sizes([], 2).shape == (0, 2)


@settings(max_examples=30)
@given(RAGGED, st.integers(6, 9))
def test_static_packs_have_one_shape(sizes: Sizes, max_images: int) -> None:
    budget = 300
    layout = Packed(1, budget, max_images, filler_label=10)
    batch = layout.to_batch(latents(sizes), torch.arange(len(sizes)))
    used = sum(h * w for h, w in sizes)
    assert batch.x.shape == (budget, 4)
    assert batch.y.shape == batch.real.shape == (max_images + 1,)
    assert batch.sizes.shape == (max_images + 1, 2)
    assert batch.cu_seqlens.shape == (max_images + 2,)
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.real.tolist() == [True] * len(sizes) + [False] * (max_images + 1 - len(sizes))
    assert (batch.y[~batch.real] == 10).all()
    assert batch.tokens[len(sizes) :].tolist() == [0] * (max_images - len(sizes)) + [budget - used]
    assert (batch.x[used:] == 0).all()
    assert batch.cu_seqlens[-1] == budget
    assert torch.equal(batch.cu_seqlens.diff().long(), batch.tokens)
    assert batch.max_seqlen >= int(batch.tokens.max())
    assert batch.sides % (budget // 32) == 0 <= batch.sides - sum(h + w for h, w in sizes) < budget // 32


def test_a_full_pack_has_an_empty_filler() -> None:
    batch = Packed(1, 20, 3).to_batch(latents([(4, 4), (2, 2)]), torch.arange(2))
    assert batch.tokens.tolist() == [16, 4, 0, 0]
    assert batch.real.tolist() == [True, True, False, False]


def test_max_seqlen_takes_few_values_and_bounds_the_rows() -> None:
    bounds = [Packed(1).to_batch(latents([(1, n)]), torch.zeros(1)).max_seqlen for n in range(1, 65)]
    assert all(bound >= n for n, bound in enumerate(bounds, start=1))
    assert sorted(set(bounds)) == [1, 2, 4, 8, 16, 32, 64]


def test_padded_rows_are_zero_behind_the_image() -> None:
    batch = Padded(1, 12).to_batch(latents([(2, 3), (3, 4)]), torch.arange(2))
    assert batch.x.shape == (2, 12, 4)
    assert batch.mask.sum(1).tolist() == [6, 12]
    assert (batch.x[0, 6:] == 0).all()
    assert (batch.x[batch.mask].abs().sum(1) > 0).all()


@pytest.mark.parametrize("layout", [Dense(2), Padded(2), Packed(2)], ids=lambda layout: layout.name)
def test_a_side_that_does_not_divide_is_refused(layout: Dense | Padded | Packed) -> None:
    with pytest.raises(ValueError, match=r"\(4, 5\).*model\.patch_size=2"):
        layout.to_batch(latents([(4, 5)]), torch.zeros(1))


def test_dense_refuses_mixed_sizes() -> None:
    with pytest.raises(ValueError, match=r"layout=dense.*data\.view=square"):
        Dense(1).to_batch(latents([(4, 4), (4, 2)]), torch.arange(2))


def test_padded_refuses_an_image_that_is_too_long() -> None:
    with pytest.raises(ValueError, match=r"16 tokens.*data\.max_tokens"):
        Padded(1, 15).to_batch(latents([(4, 4)]), torch.zeros(1))


@pytest.mark.parametrize(("tokens", "images"), [(31, 4), (40, 1)])
def test_packed_refuses_what_is_over_the_budget(tokens: int, images: int) -> None:
    with pytest.raises(ValueError, match=r"data\.max_tokens"):
        Packed(1, tokens, images).to_batch(latents([(4, 4), (4, 4)]), torch.arange(2))


def test_a_configuration_of_before_names_its_layout_alone() -> None:
    config = composed("model=dit_tiny")
    assert config["layout"]["_target_"] == "genfound.layouts.dense.Dense"
    for layout in (config["layout"], {"name": "dense"}):
        assert isinstance(build.sampling_layout({**config, "layout": layout}), Dense)
    foreign = {"name": "dense", "_target_": "subprocess.call"}
    with pytest.raises(ValueError, match=r"layout\._target_=subprocess\.call is code outside genfound"):
        build.sampling_layout({**config, "layout": foreign})
