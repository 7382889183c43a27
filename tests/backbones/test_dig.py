"""DiG: the same in both layouts, each option in the network, and how it begins."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from genfound import build
from genfound.backbones.dig import DiG
from genfound.batch import Batch
from genfound.layouts import Dense, Packed
from genfound.rng import Rng
from genfound.tokenizers import LatentSpec
from tests.helpers import assert_equal_gradients, composed, latents, loss_and_gradients

SIZES = [(6, 10), (8, 8), (2, 14), (4, 2)]
TIMES = torch.tensor([10.0, 300.0, 600.0, 999.0])
STATIC = Packed(2, max_tokens=90, max_images=6, filler_label=10)
SMALL: dict[str, Any] = {"width": 32, "depth": 6, "heads": 2}


def fresh(**options: Any) -> DiG:
    """Six small blocks as they are initialised."""
    config = composed("model=dig_s")
    net = build.net({**config, "model": {**config["model"], **SMALL, **options}}, LatentSpec(4, 8), 10)
    assert isinstance(net, DiG)
    return net


def small(std: float = 0.1, **options: Any) -> DiG:
    """Six small blocks whose weights are all random, also those that start at zero."""
    net, generator = fresh(**options), torch.Generator().manual_seed(0)
    for name, parameter in net.named_parameters():
        nn.init.normal_(parameter, std=std, generator=generator)
        if "norm" in name:
            parameter.data += 1
    return net.eval()


def times(batch: Batch) -> Tensor:
    return nn.functional.pad(TIMES, (0, max(len(batch.y) - len(TIMES), 0)))[: len(batch.y)]


OPTIONS: list[dict[str, Any]] = [
    {}, {"conv": "inside", "conv_size": 5}, {"restore_order": False}, {"skip": "xavier"}, {"rms_norm": True},
    {"skip": "xavier", "align_skips": False}, {"conv": "none", "recurrence": "reference"},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS)
def test_images_of_a_pack_are_as_alone(options: dict[str, Any]) -> None:
    net, z = small(**options), latents(SIZES)
    y = torch.arange(len(z))
    with torch.no_grad():
        alone = [net(Dense(2).to_batch([image], y[i : i + 1]), TIMES[i : i + 1])[0] for i, image in enumerate(z)]
        for layout in (Packed(2), STATIC):
            batch = layout.to_batch(z, y)
            for found, wanted in zip(layout.to_latents(net(batch, times(batch)), batch), alone, strict=True):
                torch.testing.assert_close(found, wanted, atol=2e-5 * wanted.abs().max().item(), rtol=0)


def test_gradients_of_a_pack_are_those_of_its_images() -> None:
    net, z = small(std=0.05, skip="xavier"), latents(SIZES)  # larger ones lose digits on some processors
    batch = STATIC.to_batch(z, torch.arange(len(z)))
    _, found = loss_and_gradients(net, batch, times(batch))
    total: dict[str, Tensor] = {}
    for i, image in enumerate(z):
        one = Dense(2).to_batch([image], torch.tensor([i]))
        _, own = loss_and_gradients(net, one, TIMES[i : i + 1])
        total = {name: total.get(name, 0) + own[name] for name in own}
    assert_equal_gradients(found, total, 1e-4)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("packed", [False, True])
def test_compiled_equals_eager(packed: bool) -> None:
    z = latents([(8, 8)] * 3)
    batch = (STATIC if packed else Dense(2)).to_batch(z, torch.arange(3))
    eager, compiled = (small(depth=2, skip="none").train() for _ in range(2))
    compiled.compile(fullgraph=True, backend="aot_eager")
    loss, gradients = loss_and_gradients(eager, batch, times(batch))
    again, others = loss_and_gradients(compiled, batch, times(batch))
    torch.testing.assert_close(again, loss, rtol=1e-5, atol=0)
    assert_equal_gradients(others, gradients, 1e-4)


CHANGES: dict[str, Any] = {
    "flip": False, "transpose": False, "restore_order": False, "conv": "inside", "conv_size": 5, "gate_normalizer": 4,
    "rms_norm": True, "skip": "xavier", "expand_k": 1.0, "expand_v": 2.0, "gate_rank": 4, "mlp_ratio": 40,
}  # fmt: skip


@pytest.mark.parametrize("key", CHANGES)
def test_every_option_is_in_the_network(key: str) -> None:
    batch = Dense(2).to_batch(latents([(8, 8)] * 2), torch.tensor([1, 2]))
    t = torch.tensor([20.0, 700.0])
    plain, changed = small(), small(**{key: CHANGES[key]})
    shapes = [{name: p.shape for name, p in net.named_parameters()} for net in (plain, changed)]
    with torch.no_grad():
        assert shapes[0] != shapes[1] or (plain(batch, t) - changed(batch, t)).abs().max() > 1e-3


@pytest.mark.parametrize("layout", [Dense(2), STATIC])
def test_what_a_block_gives_is_seen_by_rows(layout: Dense | Packed) -> None:
    """Blocks give what they are given when they begin."""
    net, seen = fresh(), list[Tensor]()
    batch = layout.to_batch(latents([(8, 4)] * 3), torch.tensor([1, 2, 3]))
    for block in net.blocks:
        block.register_forward_hook(lambda _, given, out: seen.append(out))
    net(batch, times(batch))
    assert not torch.equal(seen[0], seen[1])
    for i, out in enumerate(seen):
        torch.testing.assert_close(net.image_tokens(out, i, batch), seen[0])


def test_a_skip_is_brought_to_the_order_of_its_receiver() -> None:
    batch = Dense(2).to_batch(latents([(8, 8)]), torch.tensor([1]))
    with torch.no_grad():
        aligned, released = (small(skip="xavier", align_skips=own)(batch, TIMES[:1]) for own in (True, False))
    assert (aligned - released).abs().max() > 1e-3


def test_it_begins_as_published() -> None:
    net, plain = fresh(skip="identity"), fresh()
    for module in (net, plain):
        module.initialise(Rng(0))
    batch = Dense(2).to_batch(latents([(8, 8)]), torch.tensor([1]))
    assert not net(batch, TIMES[:1]).any()
    for block in net.blocks[4:]:
        x = torch.randn(1, 16, 32)
        torch.testing.assert_close(block.skip_linear(torch.cat([x, torch.randn_like(x)], dim=-1)), x)
    x = torch.randn(1, 32, 4, 4)
    torch.testing.assert_close(net.blocks[0].dw_conv(x), x)
    bound = 2**-2.5 * (6 / (32 + 16)) ** 0.5
    assert 0.9 * bound < net.blocks[0].attn.q_proj.weight.abs().max() <= bound


def test_long_skips_need_an_even_depth() -> None:
    with pytest.raises(ValueError, match=r"^model.depth=3 must be even with model.skip=xavier$"):
        fresh(depth=3, skip="xavier")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("conv", "before", "model.conv=before is unknown; choose one of none, after, inside"),
        ("conv_size", 4, "model.conv_size=4 must be odd"),
        ("skip", "zero", "model.skip=zero is unknown; choose one of none, xavier, identity"),
        ("expand_k", 0.3, "model.width=32 must be a multiple of 4, and times model.expand_k=0.3 of model.heads=2"),
        ("recurrence", "fast", "model.recurrence=fast is unknown; choose one of auto, reference, chunked, fla"),
    ],
)
def test_what_is_no_option_is_named(key: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError) as error:
        fresh(**{key: value})
    assert str(error.value) == message
