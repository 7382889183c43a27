from __future__ import annotations

import pytest
import torch

from genfound import build
from genfound.backbones.base import Backbone
from genfound.layouts import Dense
from genfound.tokenizers import LatentSpec
from tests.helpers import composed, latents, randomise

SIZES = {  # with and without the unused half of the released code
    ("sit_s", 2): (32_963_360, 32_957_200), ("sit_s", 4): (32_945_024, 32_920_384),
    ("sit_s", 8): (33_148_160, 33_049_600),
    ("sit_b", 2): (130_512_416, 130_500_112), ("sit_b", 4): (130_475_648, 130_426_432),
    ("sit_b", 8): (130_881_536, 130_684_672), ("sit_l", 2): (458_102_816, 458_086_416),
    ("sit_l", 4): (458_053_760, 457_988_160), ("sit_l", 8): (458_594_816, 458_332_416),
    ("sit_xl", 2): (675_129_632, 675_111_184), ("sit_xl", 4): (675_074_432, 675_000_640),
    ("sit_xl", 8): (675_683_072, 675_387_904),
}  # fmt: skip


def sit(**options: object) -> Backbone:
    config = composed("model=sit_s")
    model = {**config["model"], "width": 32, "depth": 2, "heads": 2, **options}
    return randomise(build.net({**config, "model": model}, LatentSpec(4, 8), 7))


@pytest.mark.parametrize("name, patch", SIZES)
def test_parameter_counts(name: str, patch: int) -> None:
    for unused, count in zip((True, False), SIZES[name, patch], strict=True):
        config = composed(f"model={name}", f"model.patch_size={patch}", f"model.unused_half={unused}".lower())
        with torch.device("meta"):
            net = build.net(config, LatentSpec(4, 8), 1000)
        table = (32 // patch) ** 2 * config["model"]["width"]
        assert sum(p.numel() for p in net.parameters()) + table == count


def test_the_unused_half_is_dropped_and_never_trained() -> None:
    net = sit()
    batch = Dense(2).to_batch(latents([(8, 8)] * 3), torch.tensor([0, 1, 2]))
    out = net(batch, torch.tensor([0.0, 0.5, 1.0]))
    assert out.shape == batch.x.shape
    (out**2).sum().backward()
    grad = net.get_parameter("final_layer.linear.weight").grad
    assert grad is not None
    used, unused = grad.unflatten(0, (2, -1))
    assert (unused == 0).all() and (used.abs().sum(dim=1) > 0).all()


def test_a_learned_variance_takes_the_second_half() -> None:
    net = sit(learn_sigma=True)
    batch = Dense(2).to_batch(latents([(8, 8)]), torch.tensor([1]))
    assert net(batch, torch.tensor([500])).shape == (1, 8, 8, 8)
    assert net.time == "data1"
