from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from genfound.backbones.jit import JiT
from genfound.layers.tokens import Prefix
from genfound.layouts import Dense, Layout, Packed, Padded
from genfound.modules.jit import JiTModule
from genfound.rng import Rng
from tests.helpers import assert_equal_gradients, composed, latents, linear_flow, loss_and_gradients

SIZES = [(6, 10), (8, 8), (2, 14), (4, 2)]
TIMES = torch.tensor([0.1, 0.5, 0.9, 1.0])
SMALL = {
    "width": 32, "depth": 3, "heads": 2, "patch_size": 2, "attention": "loop", "learn_sigma": False, "channels": 4,
    "num_classes": 10, "bottleneck_dim": 6, "in_context_len": 5, "in_context_start": 1,
}  # fmt: skip
STATIC = Packed(2, max_tokens=80, max_images=6, filler_label=10)


def small(**options: Any) -> JiT:
    """Three small blocks whose weights are all random, also those that start at zero."""
    model = {**composed("model=jit_b")["model"], **SMALL, **options}
    del model["_target_"]
    net, generator = JiT(**model), torch.Generator().manual_seed(0)
    for name, parameter in net.named_parameters():
        nn.init.normal_(parameter, std=0.15, generator=generator)
        if "norm" in name:
            parameter.data += 1
    return net.eval()


def images(net: JiT, layout: Layout, z: list[Tensor], first: int = 0) -> list[Tensor]:
    """The network's output for each latent, with labels from `first` on."""
    batch = layout.to_batch(z, torch.arange(len(z)) + first)
    with torch.no_grad():
        return layout.to_latents(net(batch, nn.functional.pad(TIMES[: len(z)], (0, len(batch.y) - len(z)))), batch)


@pytest.mark.parametrize("options", [{}, {"in_context_len": 0}, {"in_context_start": 0, "positions": "table"}])
@pytest.mark.parametrize("square", [False, True])
def test_all_layouts_agree(options: dict[str, Any], square: bool) -> None:
    net, z = small(**options), latents([(8, 8)] * 3 if square else SIZES)
    layouts = [Padded(2), Padded(2, 40), Packed(2), STATIC, *([Dense(2)] if square else [])]
    first, *others = [images(net, layout, z) for layout in layouts]
    for other in [*others, [images(net, Packed(2), [z[0]])[0], *first[1:]]]:
        for ours, expected in zip(other, first, strict=True):
            torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_gradients_of_a_static_pack_are_those_of_padded_rows() -> None:
    net, z = small(), latents(SIZES)
    found = []
    for layout in (Padded(2), STATIC):
        batch = layout.to_batch(z, torch.arange(len(z)))
        found.append(loss_and_gradients(net, batch, nn.functional.pad(TIMES, (0, len(batch.y) - len(z))))[1])
    assert "in_context_posemb" in found[0]
    assert_equal_gradients(found[1], found[0], 1e-4)


def test_class_tokens_matter_from_their_block_on_and_know_no_time() -> None:
    z = latents([(4, 4)])
    outs = [images(small(in_context_start=start), Dense(2), z)[0] for start in (0, 1, 2)]
    assert all((a - b).abs().max() > 1e-3 for a, b in ((outs[0], outs[1]), (outs[1], outs[2])))
    net, seen = small(), list[Tensor]()
    net.blocks[1].register_forward_pre_hook(lambda _, given: seen.append(given[0][:, :5]))
    for t in (0.2, 0.9):
        net(Dense(2).to_batch(z, torch.tensor([3])), torch.tensor([t]))
    expected = net.y_embedder(torch.tensor([3]))[:, None] + net.in_context_posemb
    assert torch.equal(seen[0], expected) and torch.equal(seen[1], expected)


@pytest.mark.parametrize("layout", [Dense(2), Padded(2, 20), Packed(2), Packed(2, 40, 4)])
def test_a_prefix_is_taken_away_again(layout: Layout) -> None:
    batch = layout.to_batch(latents([(4, 6), (4, 6)]), torch.arange(2))
    prefix, rows = Prefix(batch, 3), len(batch.y)
    tokens = torch.randn(*((len(batch.image_of),) if batch.image_of is not None else (rows, 20)), 8)
    more = torch.randn(rows, 3, 8)
    joined = prefix.add(tokens, more)
    assert torch.equal(prefix.remove(joined), tokens)
    longer = prefix.batch
    if longer.image_of is None or longer.cu_seqlens is None:
        assert torch.equal(joined[:, :3], more)
        return
    bounds = longer.cu_seqlens.tolist()
    assert bounds[-1] == len(joined) == len(tokens) + 3 * rows
    assert longer.max_seqlen >= max(b - a for a, b in pairwise(bounds))
    for row, (a, b) in enumerate(pairwise(bounds)):
        assert torch.equal(joined[a : a + 3], more[row]) and (longer.image_of[a:b] == row).all()


def test_its_options_are_checked_and_the_output_begins_at_zero() -> None:
    model = {**composed("model=jit_b")["model"], **SMALL}
    del model["_target_"]
    assert not images(JiT(**model), Dense(2), latents([(4, 4)]))[0].any()
    for wrong, text in (
        ({"in_context_start": 3}, r"model\.in_context_start=3 must be less than model\.depth=3"),
        ({"in_context_len": -1}, r"model\.in_context_len=-1 must be a whole number of at least 0"),
        ({"bottleneck_dim": 0}, r"model\.bottleneck_dim=0 must be a whole number of at least 1"),
        ({"dropout": 2}, r"model\.dropout=2 must be a finite number of at least 0 and at most 1"),
    ):
        with pytest.raises(ValueError, match=text):
            JiT(**{**model, **wrong})


def test_dropout_is_of_the_middle_blocks_in_training_and_of_the_micro_batch() -> None:
    net = small(depth=4, dropout=0.5)
    module = JiTModule(net, linear_flow(), {}, 0.0, seed=0, budget=1)
    batch = Dense(2).to_batch(latents([(8, 8)] * 3), torch.arange(3))

    def loss(number: int) -> Tensor:
        return module.evaluate(batch, Rng(0, "train", number)).total.detach()

    rest = loss(1)
    assert torch.equal(loss(1), rest)
    net.train()
    dropped = loss(1)
    assert torch.equal(loss(1), dropped) and not torch.equal(dropped, rest)
    assert [isinstance(block.attn.dropout, nn.Dropout) for block in net.blocks] == [False, True, True, False]


def test_vectors_and_biases_do_not_decay() -> None:
    net = small()
    groups = JiTModule(net, linear_flow(), {"weight_decay": 0.1}, 0.0, seed=0, budget=1).parameter_groups()
    decayed, kept = ({id(p) for p in group["params"]} for group in groups)
    assert not decayed & kept and len(decayed | kept) == len(list(net.parameters()))
    for name, parameter in net.named_parameters():
        vector = name.endswith(".bias") or name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "l.weight"))
        assert (id(parameter) in kept) == (vector and parameter.ndim == 1), name


def test_an_eager_pack_does_not_read_other_images() -> None:
    net, z = small(), latents(SIZES)
    batch = Packed(2).to_batch(z, torch.arange(4))
    assert batch.image_of is not None
    changed = replace(batch, x=torch.where(batch.image_of[:, None] == 1, batch.x + 1, batch.x))
    before, after = (net(either, TIMES) for either in (batch, changed))
    own = batch.image_of == 1
    assert torch.equal(before[~own], after[~own]) and not torch.equal(before[own], after[own])
