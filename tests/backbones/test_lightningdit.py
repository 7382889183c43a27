from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from genfound.backbones.lightningdit import LightningDiT
from genfound.checkpoints.official.lightningdit import gated_ratio
from genfound.layers.mlp import feed_forward
from genfound.layouts import Dense, Layout, Packed, Padded
from tests.helpers import composed, latents

SIZES = [(6, 10), (8, 8), (2, 14), (4, 2)]
TIMES = torch.tensor([0.1, 0.5, 0.9, 1.0])
SMALL = {"width": 32, "depth": 2, "heads": 2, "patch_size": 2, "attention": "loop", "learn_sigma": False}
NETWORKS: list[dict[str, Any]] = [
    {},
    {"ffn": "mlp", "norm": "layernorm", "qk_norm": "wb_layernorm", "positions": "table"},
    {"shift": False, "qk_norm": "w_rmsnorm", "positions": "rope", "unused_half": True},
]


def small(**options: Any) -> LightningDiT:
    """Two small blocks whose weights are all random, also those that start at zero."""
    model = {**composed("model=lightningdit_b")["model"], **SMALL, "channels": 4, "num_classes": 10, **options}
    del model["_target_"]
    net, generator = LightningDiT(**model), torch.Generator().manual_seed(0)
    for name, parameter in net.named_parameters():
        nn.init.normal_(parameter, std=0.15, generator=generator)
        if "norm" in name:
            parameter.data += 1
    return net


def images(net: LightningDiT, layout: Layout, z: list[Tensor]) -> list[Tensor]:
    """The network's output for each latent."""
    batch = layout.to_batch(z, torch.arange(len(z)))
    with torch.no_grad():
        return layout.to_latents(net(batch, nn.functional.pad(TIMES[: len(z)], (0, len(batch.y) - len(z)))), batch)


@pytest.mark.parametrize("options", NETWORKS)
@pytest.mark.parametrize("square", [False, True])
def test_all_layouts_agree(options: dict[str, Any], square: bool) -> None:
    net, z = small(**options), latents([(8, 8)] * 3 if square else SIZES)
    static = Packed(2, max_tokens=80, max_images=6, filler_label=10)
    layouts = [Padded(2), Padded(2, 40), Packed(2), static, *([Dense(2)] if square else [])]
    first, *others = [images(net, layout, z) for layout in layouts]
    for other in others:
        for ours, expected in zip(other, first, strict=True):
            torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("positions", ["both", "rope", "table"])
def test_every_kind_of_position_tells_tokens_apart(positions: str) -> None:
    """Without positions equal tokens would come out equal; only rotary ones are relative, and leave those equal too."""
    net = small(positions=positions)
    z = latents([(8, 8)])
    same, moved = (images(net, Dense(2), [x])[0] for x in (z[0], z[0].roll((2, 4), (1, 2))))
    assert (moved.roll((-2, -4), (1, 2)) - same).abs().max() > 1e-3
    flat = images(net, Dense(2), [torch.ones(4, 8, 8)])[0]
    spread = (flat - flat[:, :2, :2].tile(1, 4, 4)).abs().max()
    assert (spread > 1e-3) == (positions != "rope")


def test_scales_alone_have_no_shifts() -> None:
    net = small(shift=False)
    c = torch.randn(3, 32)
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = net.blocks[0].adaLN_modulation(c).chunk(6, dim=1)
    assert not shift_a.any() and not shift_m.any()
    linear = net.blocks[0].adaLN_modulation[1]
    torch.testing.assert_close(torch.cat([scale_a, gate_a, scale_m, gate_m], 1), linear(nn.functional.silu(c)))


def test_an_unused_half_is_never_seen_and_a_learned_variance_is() -> None:
    z = latents([(4, 4)])
    net = small(unused_half=True)
    before = images(net, Dense(2), z)[0]
    nn.init.ones_(net.final_layer.linear.weight[16:].detach())
    assert before.shape == (4, 4, 4) and torch.equal(images(net, Dense(2), z)[0], before)
    assert images(small(learn_sigma=True), Dense(2), z)[0].shape == (8, 4, 4)


def test_it_begins_at_zero_and_refuses_what_does_not_fit() -> None:
    model = {**composed("model=lightningdit_b")["model"], **SMALL, "channels": 4, "num_classes": 10}
    del model["_target_"]
    assert not images(LightningDiT(**model), Dense(2), latents([(4, 4)]))[0].any()
    for wrong, text in (
        ({"positions": "none"}, r"model\.positions=none is unknown; choose one of both, rope, table"),
        ({"width": 30}, r"model\.width=30 must be a multiple of 4 and of model\.heads=2"),
        ({"width": 36, "heads": 6}, r"model\.width=36 over model\.heads=6 must be a multiple of 4"),
    ):
        with pytest.raises(ValueError, match=text):
            LightningDiT(**{**model, **wrong})


@pytest.mark.parametrize(("width", "ratio"), [(32, 4.0), (1024, 4.0), (1792, 4.0), (40, 3.0), (48, 2.7), (768, 3.5)])
def test_a_ratio_is_told_by_the_hidden_size(width: int, ratio: float) -> None:
    hidden = feed_forward("swiglu_fused", width, ratio, True).w3.in_features
    told = gated_ratio(hidden, width)
    assert feed_forward("swiglu_fused", width, told, True).w3.in_features == hidden
    assert told == 4.0 or ratio != 4.0
