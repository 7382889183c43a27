"""NiT for text: what a caption changes, and what it must not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from genfound import build
from genfound.backbones.nit_t2i import NiTT2I
from genfound.batch import Batch
from genfound.layers import attention
from genfound.tokenizers import LatentSpec
from tests import helpers
from tests.helpers import assert_equal_gradients, composed, packed

SIZES = [(3, 5), (4, 4), (1, 7), (2, 1)]
TIMES = torch.tensor([0.1, 0.5, 0.9, 1.0])
LENGTHS = [3, 6, 1, 4]
NULL = 10


def network(**options: Any) -> NiTT2I:
    """Two small blocks whose weights are all random."""
    config = composed("model=nit_t2i_tiny")
    small = {"width": 32, "depth": 2, "heads": 2, "patch_size": 1, "adaln_rank": 4, "attention": "loop", **options}
    encoder = {**config["text_encoder"], "width": 12, "tokens": 6}
    config = {**config, "model": {**config["model"], **small}, "text_encoder": encoder}
    net = build.net(config, LatentSpec(4, 1), NULL)
    assert isinstance(net, NiTT2I)
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
    return net


def texts(seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, 12, generator=generator) for length in LENGTHS]


def described(batch: Batch, tokens: int = 6) -> Batch:
    return batch.with_text(texts()[: int(batch.real.sum())], tokens)


def alone(batch: Batch, k: int, text: Tensor) -> Batch:
    piece = batch.x.split(batch.tokens.tolist())[k]
    return replace(packed([SIZES[k]]), x=piece, y=batch.y[k : k + 1]).with_text([text], len(text))


def loss_and_gradients(net: NiTT2I, batch: Batch, t: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Without those that are rounding alone: what is added to all keys that a query sees changes nothing."""
    loss, gradients = helpers.loss_and_gradients(net, batch, t)
    return loss, {name: g for name, g in gradients.items() if not name.endswith("cross.k_norm.bias")}


def per_image(out: Tensor) -> tuple[Tensor, ...]:
    return out.split([h * w for h, w in SIZES])


def test_the_published_size() -> None:
    """673 M in the paper, as the 675 M of NiT-XL without projector and encoder; without text and alignment there is:"""
    config = composed("model=nit_t2i_xl")
    with torch.device("meta"):
        net = build.net(config, LatentSpec(channels=32, stride=32), num_classes=0)
    count = sum(p.numel() for p in net.parameters())
    assert count == 673_214_368 and round(count / 1e6) == 673
    block = 16 * 1152**2 + 10 * 1152 * config["model"]["adaln_rank"]
    assert count == pytest.approx(28 * block, rel=0.01)
    assert (net.text_width, net.text_tokens) == (1152, 256)


def test_a_pack_gives_what_each_image_alone_gives() -> None:
    net, batch = network(), packed(SIZES)
    together = per_image(net(described(batch), TIMES))
    for k, text in enumerate(texts()):
        out = net(alone(batch, k, text), TIMES[k : k + 1])
        torch.testing.assert_close(out, together[k], atol=1e-5, rtol=1e-5)


def test_room_for_more_text_tokens_changes_nothing_whatever_is_in_it() -> None:
    net, batch = network(), packed(SIZES)
    exact, roomy = net(described(batch), TIMES), described(batch, 9)
    torch.testing.assert_close(net(roomy, TIMES), exact, atol=1e-5, rtol=1e-5)
    assert roomy.text is not None
    for row, length in zip(roomy.text, LENGTHS, strict=True):
        row[length:] = 1e3
    torch.testing.assert_close(net(roomy, TIMES), exact, atol=1e-5, rtol=1e-5)


def test_filler_changes_nothing_and_neither_output_nor_gradient_is_lost() -> None:
    net = network()
    exact, static = (described(packed(SIZES, **room)) for room in ({}, STATIC))
    padded = torch.nn.functional.pad(TIMES, (0, 6))
    torch.testing.assert_close(net(static, padded)[: len(exact.x)], net(exact, TIMES), atol=1e-5, rtol=1e-5)
    assert net(static, padded).isfinite().all()
    (loss, gradients), (same, others) = (loss_and_gradients(net, *it) for it in ((exact, TIMES), (static, padded)))
    torch.testing.assert_close(loss, same)
    assert_equal_gradients(gradients, others, 1e-4)


STATIC = {"max_tokens": 60, "max_images": 9, "filler_label": NULL}


def test_text_and_time_change_an_image_and_labels_do_not() -> None:
    net, batch = network(), described(packed(SIZES))
    base = per_image(net(batch, TIMES))
    others = batch.with_text([texts()[0], texts(2)[1], texts()[2], texts()[3]], 6)
    moved = per_image(net(others, TIMES))
    later = per_image(net(batch, TIMES + torch.tensor([0.0, 0.1, 0.0, 0.0])))
    for changed in (moved, later):
        assert [(a - b).abs().max() > 1e-3 for a, b in zip(changed, base, strict=True)] == [False, True, False, False]
    assert torch.equal(net(replace(batch, y=batch.y + 1), TIMES), net(batch, TIMES))


def test_the_null_label_takes_the_caption_away() -> None:
    net, batch = network(), packed(SIZES)
    null = torch.full((4,), NULL)
    one, two = (net(replace(described(batch), y=y), TIMES) for y in (null, batch.y))
    blind = replace(batch, y=null).with_text(texts(2), 8)
    torch.testing.assert_close(net(blind, TIMES), one, atol=1e-5, rtol=1e-5)
    assert (one - two).abs().max() > 1e-3
    assert network(label_drop=0.0).null_label is None


def test_two_batches_join_with_their_captions() -> None:
    net, batch = network(), described(packed(SIZES))
    both = net(batch.join(replace(batch, y=torch.full((4,), NULL))), TIMES.repeat(2))
    null = net(replace(batch, y=torch.full((4,), NULL)), TIMES)
    torch.testing.assert_close(both, torch.cat([net(batch, TIMES), null]), atol=1e-5, rtol=1e-5)


def test_a_batch_without_captions_is_refused() -> None:
    with pytest.raises(ValueError, match="this network reads captions: a batch needs text"):
        network()(packed(SIZES), TIMES)


def test_a_new_network_predicts_zero_and_drops_and_ranks_are_what_is_set() -> None:
    config = composed("model=nit_t2i_tiny")
    net = build.net(config, LatentSpec(3, 1), NULL)
    batch = packed([(4, 4)], channels=3, patch_size=2).with_text([torch.randn(5, 64)], 32)
    assert (net(batch, TIMES[:1]) == 0).all()
    assert len(NiTT2I.from_preset("tiny", adaln_rank=None).blocks[0].adaLN_modulation) == 2  # type: ignore[union-attr, arg-type]
    assert NiTT2I.from_preset("tiny", adaln_rank=7).blocks[0].adaLN_modulation[1].out_features == 7  # type: ignore[union-attr, index]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_blocks_give_equal_gradients_without_a_break(
    checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compiler(function, backend="aot_eager"))
    counters.clear()
    plain, net = network(), network(activation_checkpointing=checkpointing)
    net.train().compile_blocks()
    batch, t = described(packed(SIZES, **STATIC)), torch.linspace(0, 1, 10)
    loss, gradients = loss_and_gradients(plain.train(), batch, t)
    same, others = loss_and_gradients(net, batch, t)
    torch.testing.assert_close(loss, same)
    assert_equal_gradients(others, gradients, 1e-4)
    assert not counters["graph_break"]


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_gives_the_same(monkeypatch: pytest.MonkeyPatch, fresh_compiler: None) -> None:
    """Without its kernels."""
    monkeypatch.setattr(attention, "available_backends", lambda *_: ("loop", "flex"))
    monkeypatch.setattr(attention, "_compiled_flex", lambda: attention.flex_attention)
    batch, t = described(packed(SIZES, **STATIC)), torch.linspace(0.1, 0.9, 10)
    out, expected = (network(attention=name)(batch, t) for name in ("flex", "loop"))
    torch.testing.assert_close(out[:40], expected[:40], atol=1e-5, rtol=1e-5)


def test_its_arithmetic_is_that_of_its_layers() -> None:
    """Of 256 tokens and 256 text tokens, by hand."""
    config = composed("model=nit_t2i_xl")
    with torch.device("meta"):
        net = build.net(config, LatentSpec(channels=32, stride=32), num_classes=0)
    d, tokens = 1152, 256
    of_tokens = 28 * tokens * (4 * d**2 + 2 * d**2 + 8 * d**2) + 2 * 32 * d * tokens
    of_text = 28 * tokens * 2 * d**2 + tokens * d**2
    of_image = 28 * 10 * d * 224 + 256 * d + d**2 + 2 * d**2
    pairs = 28 * 2 * d * tokens**2
    across = 28 * 2 * d * tokens**2
    counted = net.flops().total(1, tokens, tokens**2) / 2
    assert counted == pytest.approx(of_tokens + of_text + of_image + pairs + across, rel=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("normalised", [True, False])
def test_queries_and_keys_of_text_are_normalised_where_it_is_wanted(normalised: bool) -> None:
    net, batch = network(qk_norm=normalised), described(packed(SIZES))
    base = net(batch, TIMES)
    for block in net.blocks:
        block.cross.q.weight.mul_(10)  # type: ignore[union-attr, operator]
        block.cross.q.bias.mul_(10)  # type: ignore[union-attr, operator]
    assert torch.allclose(net(batch, TIMES), base, atol=1e-3) == normalised


@pytest.mark.parametrize("options", [{"rope_coords": "official"}, {"rope_theta": 3.0}, {"mlp_ratio": 2}])
def test_other_options_change_the_output(options: dict[str, Any]) -> None:
    batch = described(packed(SIZES))
    assert (network(**options)(batch, TIMES) - network()(batch, TIMES)).abs().max() > 1e-3
    assert network(mlp_ratio=2).blocks[0].mlp.fc1.out_features == 64  # type: ignore[union-attr]
    assert network(learn_sigma=True)(batch, TIMES).shape == (len(batch.x), 8)
