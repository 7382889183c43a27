from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from genfound.backbones.base import Backbone, TokenSpec
from genfound.batch import Batch
from genfound.layouts import Dense, Packed, Padded
from genfound.samplers.guidance import ClassifierFree, unguided
from genfound.sampling import guided
from tests.helpers import latents, small_nit

NULL = 10
RAGGED = [(4, 4), (2, 6), (2, 2)]


class Toy(Backbone):
    """Depends on state, time and label; remembers how it was called."""

    layouts = ("dense", "padded", "packed")
    time = "data0"
    null_label: int | None = NULL

    def __init__(self, patch_size: int = 1) -> None:
        super().__init__()
        self.token_spec = TokenSpec(4, patch_size)
        self.calls: list[tuple[list[int], list[float]]] = []

    def forward(self, batch: Batch, t: Tensor) -> Tensor:
        self.calls.append((batch.y.tolist(), t.tolist()))
        return batch.x * batch.expand(0.5 + t) + batch.expand(torch.cos(batch.y.float()))


def batches(patch_size: int = 1) -> dict[str, Batch]:
    same, labels = [(4, 4)] * 3, torch.tensor([1, 5, 7])
    made = {layout.name: layout.to_batch(latents(same), labels) for layout in (Dense(patch_size), Padded(patch_size))}
    made["packed"] = Packed(patch_size).to_batch(latents(RAGGED), labels)
    made["static"] = Packed(patch_size, 40, 5, filler_label=NULL).to_batch(latents(RAGGED), labels)
    return made


def cfg(net: Backbone, **options: Any) -> ClassifierFree:
    return ClassifierFree(net, **{"scale": 2.5, "interval": [0.0, 1.0], "channels": "all", **options})


def both(net: Toy, batch: Batch, t: float) -> tuple[Tensor, Tensor]:
    times = torch.full((len(batch.y),), t)
    conditional = net(batch, times)
    null = Batch(**{**batch.__dict__, "y": torch.full_like(batch.y, NULL)})
    return conditional, net(null, times)


@pytest.mark.parametrize("layout", ["dense", "padded", "packed", "static"])
@pytest.mark.parametrize("scale", [0.0, 0.5, 2.5])
def test_guided_output_is_the_formula(layout: str, scale: float) -> None:
    batch = batches()[layout]
    conditional, null = both(Toy(), batch, 0.3)
    ours = cfg(Toy(), scale=scale)(batch, 0.3)
    torch.testing.assert_close(ours, null + scale * (conditional - null))
    assert (ours - conditional)[batch.x != 0].abs().max() > 1e-3


def test_both_passes_are_one_call() -> None:
    net = Toy()
    cfg(net)(batches()["packed"], 0.25)
    assert net.calls == [([1, 5, 7, NULL, NULL, NULL], [0.25] * 6)]


def test_scale_one_is_one_single_call() -> None:
    net = Toy()
    batch = batches()["packed"]
    out = cfg(net, scale=1)(batch, 0.25)
    assert net.calls == [([1, 5, 7], [0.25] * 3)]
    assert torch.equal(out, unguided(Toy())(batch, 0.25))


@pytest.mark.parametrize(("t", "doubled"), [(0.19, False), (0.2, True), (0.5, True), (0.7, True), (0.71, False)])
def test_the_interval_includes_its_ends_and_costs_nothing_outside(t: float, doubled: bool) -> None:
    net = Toy()
    batch = batches()["packed"]
    out = cfg(net, interval=[0.2, 0.7])(batch, t)
    assert [len(y) for y, _ in net.calls] == [6 if doubled else 3]
    assert torch.equal(out, unguided(Toy())(batch, t)) is not doubled


@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("layout", ["dense", "padded", "packed"])
def test_first3_guides_three_latent_channels(layout: str, patch_size: int) -> None:
    net = Toy(patch_size)
    batch = batches(patch_size)[layout]
    conditional, null = both(net, batch, 0.3)
    full = null + 2.5 * (conditional - null)
    count = 3 if layout == "dense" else 3 * patch_size**2
    axis = 1 if layout == "dense" else -1
    ours = cfg(net, channels="first3")(batch, 0.3)
    total = conditional.shape[axis]
    torch.testing.assert_close(ours.narrow(axis, 0, count), full.narrow(axis, 0, count))
    assert torch.equal(ours.narrow(axis, count, total - count), conditional.narrow(axis, count, total - count))


def test_all_images_are_at_the_same_time() -> None:
    net = Toy()
    unguided(net)(batches()["packed"], 0.625)
    assert net.calls == [([1, 5, 7], [0.625] * 3)]


def test_a_network_without_a_null_label_cannot_be_guided() -> None:
    net = small_nit(label_drop=0.0)
    with pytest.raises(ValueError, match=r"model\.label_drop > 0 or set guidance=none"):
        cfg(net)
    assert cfg(net, scale=1).scale == 1


@pytest.mark.parametrize("interval", [[0.5], [0.7, 0.2], [0, 0.5, 1]])
def test_an_interval_is_two_ordered_times(interval: list[float]) -> None:
    with pytest.raises(ValueError, match=r"guidance\.interval=.*low <= high"):
        cfg(Toy(), interval=interval)


def test_unknown_channels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"guidance\.channels=rgb is unknown; choose all or first3"):
        cfg(Toy(), channels="rgb")


def test_the_interval_is_a_part_of_the_times_of_the_objective() -> None:
    net, batch = Toy(), batches()["packed"]
    doubled = {}
    for t in (0.0, 199.0, 200.0, 700.0, 701.0):
        cfg(net, interval=[0.2, 0.7], time_range=(0.0, 1000.0))(batch, t)
        doubled[t] = len(net.calls[-1][0]) == 6
    assert doubled == {0.0: False, 199.0: False, 200.0: True, 700.0: True, 701.0: False}


class Variance(Toy):
    """Predicts twice the channels."""

    def forward(self, batch: Batch, t: Tensor) -> Tensor:
        out = super().forward(batch, t)
        return torch.cat([out, out + 1], dim=1 if batch.layout == "dense" else -1)


@pytest.mark.parametrize("layout", ["dense", "packed"])
@pytest.mark.parametrize("channels", ["all", "first3"])
def test_a_predicted_variance_is_the_conditional_one(layout: str, channels: str) -> None:
    batch = batches()[layout]
    out = cfg(Variance(), channels=channels)(batch, 0.3)
    mean, variance = out.chunk(2, dim=1 if layout == "dense" else -1)
    conditional, _ = both(Toy(), batch, 0.3)
    assert torch.equal(variance, conditional + 1)
    torch.testing.assert_close(mean, cfg(Toy(), channels=channels)(batch, 0.3))


def test_guidance_by_name() -> None:
    net, batch = Toy(), batches()["packed"]
    assert torch.equal(guided(net, {"name": "none"}, (0.0, 1.0))(batch, 0.5), unguided(net)(batch, 0.5))
    options = {"name": "cfg", "scale": 3.0, "interval": [0.0, 1.0], "channels": "all"}
    assert torch.equal(guided(net, options, (0.0, 1.0))(batch, 0.5), cfg(net, scale=3.0)(batch, 0.5))
