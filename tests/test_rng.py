from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from genfound.rng import Rng


def test_the_same_key_gives_the_same_numbers() -> None:
    for draw in ("normal", "uniform"):
        first = getattr(Rng(1, "train", 17), draw)("noise", (3, 4))
        again = getattr(Rng(1, "train").at(17), draw)("noise", (3, 4))
        assert torch.equal(first, again)
    assert torch.equal(Rng(1).permutation("pass", 50), Rng(1).permutation("pass", 50))


def test_another_seed_key_or_purpose_gives_other_numbers() -> None:
    streams = [
        Rng(1, "train", 17).normal("noise", (8,)),
        Rng(2, "train", 17).normal("noise", (8,)),
        Rng(1, "train", 18).normal("noise", (8,)),
        Rng(1, "val", 17).normal("noise", (8,)),
        Rng(1, "train", 17).normal("time", (8,)),
    ]
    assert len({tuple(s.tolist()) for s in streams}) == len(streams)


def test_keys_of_other_depth_do_not_collide() -> None:
    streams = [Rng(1), Rng(11), Rng(1, 1), Rng(1, 11), Rng(1, 1, 1), Rng(11, 1)]
    assert len({rng.integer("a") for rng in streams}) == len(streams)


def test_nothing_is_consumed() -> None:
    rng = Rng(0, "train", 3)
    before = rng.normal("noise", (5,))
    rng.uniform("time", (100,))
    rng.at(4).normal("noise", (5,))
    torch.randn(7)
    np.random.rand(7)
    assert torch.equal(rng.normal("noise", (5,)), before)


def test_global_generators_are_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    Rng(0).normal("noise", (9,))
    Rng(0).permutation("pass", 9)
    assert torch.equal(torch.randn(3), expected)


def test_anchor() -> None:
    """A change of these numbers changes every run that continues."""
    rng = Rng(7, "train", 17)
    assert rng.integer("noise") == 8583426498952741217
    assert rng.permutation("pass", 8).tolist() == [3, 4, 7, 2, 6, 5, 0, 1]
    torch.testing.assert_close(rng.uniform("time", (3,)), torch.tensor([0.2012203, 0.6709291, 0.344033]))
    torch.testing.assert_close(rng.normal("noise", (3,)), torch.tensor([-1.0808138, 1.0358721, -1.0131000]))


def test_draws_whose_seeds_agree_in_32_bits_differ() -> None:
    """torch's generators on the CPU keep 32 bits of a seed, of which a run soon has two that are equal."""
    one, other = (Rng(0, "train", pack) for pack in (12753, 57134))
    assert one.integer("time") % 2**32 == other.integer("time") % 2**32
    assert not torch.equal(one.uniform("time", (8,)), other.uniform("time", (8,)))


def test_generators_hold_the_words_of_their_name() -> None:
    """The state of torch's generator is set as bytes; numpy's is the same one, made of the same words."""
    words = np.frombuffer(hashlib.shake_128(b"7/train/17/noise").digest(2496), "<u4")
    theirs = np.random.MT19937()
    theirs.state = {"bit_generator": "MT19937", "state": {"key": words, "pos": 624}}
    ours = torch.randint(0, 2**20, (2000,), generator=Rng(7, "train", 17).generator("noise"))
    assert ours.tolist() == (theirs.random_raw(2000) % 2**20).tolist()


@pytest.mark.gpu
def test_cuda_generators_are_seeded_by_the_integer() -> None:
    rng = Rng(7, "train", 17)
    expected = torch.Generator("cuda").manual_seed(rng.integer("noise"))
    assert torch.equal(rng.normal("noise", (9,), "cuda"), torch.randn(9, generator=expected, device="cuda"))


def test_laws() -> None:
    normal, uniform = Rng(0).normal("a", (200_000,)), Rng(0).uniform("a", (200_000,))
    assert abs(normal.mean()) < 0.01
    assert abs(normal.std() - 1) < 0.01
    assert abs(uniform.mean() - 0.5) < 0.005
    assert 0 <= uniform.min() < 1e-3
    assert 1 - 1e-3 < uniform.max() < 1


def test_integer_has_63_bits() -> None:
    drawn = [Rng(0, i).integer("seed") for i in range(200)]
    assert all(0 <= n < 2**63 for n in drawn)
    assert max(drawn) > 2**62
    assert len(set(drawn)) == 200


def test_permutation_is_one() -> None:
    assert sorted(Rng(3).permutation("pass", 1000).tolist()) == list(range(1000))
