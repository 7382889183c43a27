from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from genfound.backbones.base import Backbone, TokenSpec
from genfound.batch import Batch
from genfound.layouts import Dense, Packed, Padded
from genfound.objectives.base import GuidanceOf, TimeAdapter
from genfound.samplers.guidance import AutoGuidance, ClassifierFreeGuidance
from tests.helpers import SAMPLERS, guidance_of, latents, linear_flow, sampler_of, small_nit
from tests.samplers.test_ddpm import objective as gaussian
from tests.samplers.toys import SeededNoise, doubled

NULL = 10
TIMES = ("data0", "data1")
OPTIONS: dict[str, Any] = {"scale": 2.5, "interval": [0.0, 1.0], "channels": "all"}
RAGGED = [(4, 4), (2, 6), (2, 2)]


class Toy(Backbone):
    """Depends on state, time and label; remembers how it was called."""

    layouts = ("dense", "padded", "packed")
    time = "data0"
    null_label: int | None = NULL

    def __init__(self, patch_size: int = 1, time: str = "data0") -> None:
        super().__init__()
        self.time = time
        self.token_spec = TokenSpec(4, patch_size)
        self.calls: list[tuple[list[int], list[float]]] = []

    def forward(self, batch: Batch, t: Tensor) -> Tensor:
        self.calls.append((batch.y.tolist(), t.tolist()))
        t = 1 - t if self.time == "data1" else t
        out = batch.x * batch.expand(0.5 + t) + batch.expand(torch.cos(batch.y.float()))
        return -out if self.time == "data1" else out


def batches(patch_size: int = 1) -> dict[str, Batch]:
    same, labels = [(4, 4)] * 3, torch.tensor([1, 5, 7])
    made = {layout.name: layout.to_batch(latents(same), labels) for layout in (Dense(patch_size), Padded(patch_size))}
    made["packed"] = Packed(patch_size).to_batch(latents(RAGGED), labels)
    made["static"] = Packed(patch_size, 40, 5, filler_label=NULL).to_batch(latents(RAGGED), labels)
    return made


def cfg(net: Backbone, **options: Any) -> ClassifierFreeGuidance:
    return ClassifierFreeGuidance(
        TimeAdapter(net), **{"scale": 2.5, "interval": [0.0, 1.0], "channels": "all", **options}
    )


def guided(**options: Any) -> GuidanceOf:
    return functools.partial(
        ClassifierFreeGuidance, **{"scale": 2.5, "interval": [0.0, 1.0], "channels": "all", **options}
    )


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
    assert torch.equal(out, TimeAdapter(Toy())(batch, 0.25))


@pytest.mark.parametrize(("t", "doubled"), [(0.19, False), (0.2, True), (0.5, True), (0.7, True), (0.71, False)])
def test_the_interval_includes_its_ends_and_costs_nothing_outside(t: float, doubled: bool) -> None:
    net = Toy()
    batch = batches()["packed"]
    out = cfg(net, interval=[0.2, 0.7])(batch, t)
    assert [len(y) for y, _ in net.calls] == [6 if doubled else 3]
    assert torch.equal(out, TimeAdapter(Toy())(batch, t)) is not doubled


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
    TimeAdapter(net)(batches()["packed"], 0.625)
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
    with pytest.raises(ValueError, match=r"guidance\.channels=rgb is unknown; choose one of all, first3"):
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
    net, batch, flow = Toy(), batches()["packed"], linear_flow()
    assert torch.equal(flow.field(net, guidance_of("none")).velocity(batch, 0.5), TimeAdapter(net)(batch, 0.5))
    assert torch.equal(
        flow.field(net, guidance_of("cfg", scale=3.0)).velocity(batch, 0.5), cfg(net, scale=3.0)(batch, 0.5)
    )


@pytest.mark.parametrize(("t", "guided_"), [(0.2, False), (0.21, True), (0.69, True), (0.7, False)])
def test_a_strict_interval_is_without_its_ends(t: float, guided_: bool) -> None:
    net = Toy()
    cfg(net, interval=[0.2, 0.7], ends="strict")(batches()["packed"], t)
    assert (len(net.calls[0][0]) == 6) is guided_


@pytest.mark.parametrize("t", [-0.3, 1.2])
def test_the_whole_interval_has_no_end(t: float) -> None:
    """Adaptive solvers ask about times beyond both ends."""
    net = Toy()
    cfg(net)(batches()["packed"], t)
    assert len(net.calls[0][0]) == 6


@pytest.mark.parametrize(("level", "share"), [(1.0, 1.0), (0.0, 0.0), (0.5, 0.5), (0.25, 0.1464466)])
def test_the_power_cosine_schedule(level: float, share: float) -> None:
    batch = batches()["packed"]
    conditional, null = both(Toy(), batch, level)
    scale = 1 + 1.5 * share
    ours = cfg(Toy(), schedule="power_cosine", power=1.0)(batch, level)
    torch.testing.assert_close(ours, null + scale * (conditional - null), atol=1e-5, rtol=1e-5)
    assert cfg(Toy(), schedule="power_cosine", power=2.0).scale_at(0.5**0.5) == pytest.approx(1.75)


@pytest.mark.parametrize("sampler", ["euler", "heun", "dopri5", "sde"])
@pytest.mark.parametrize("options", [{}, {"interval": [0.1, 0.7]}, {"schedule": "power_cosine", "power": 1.5}])
def test_a_network_that_counts_backwards_is_guided_alike(sampler: str, options: dict[str, Any]) -> None:
    batch, flow, ends, counts = batches()["packed"], linear_flow(), [], []
    for time in ("data0", "data1"):
        net = Toy(time=time)
        times = flow.times(10)
        ends.append(SAMPLERS[sampler](flow.field(net, guided(**options)), batch, times, SeededNoise(batch)).x)
        counts.append([len(y) for y, _ in net.calls])
    torch.testing.assert_close(ends[0], ends[1], atol=1e-4, rtol=1e-4)
    assert counts[0] == counts[1]


@pytest.mark.parametrize(("sampler", "calls"), [("euler", 10), ("heun", 19), ("sde", 10)])
def test_an_interval_costs_in_proportion(sampler: str, calls: int) -> None:
    """Rows of the network, over those without guidance: 1 plus the share of guided calls."""
    batch, flow, rows = batches()["packed"], linear_flow(), {}
    for interval in ((0.0, 1.0), (0.0, 0.45), (0.95, 0.97)):
        net = Toy()
        field = flow.field(net, guided(interval=list(interval)))
        SAMPLERS[sampler](field, batch, flow.times(10), SeededNoise(batch))
        assert len(net.calls) == calls
        rows[interval] = sum(len(y) for y, _ in net.calls) / (3 * calls)
    assert rows[0.0, 1.0] == 2
    assert rows[0.95, 0.97] == 1
    assert rows[0.0, 0.45] == pytest.approx(1.45, abs=0.1)


def test_both_slopes_of_a_step_are_guided_alike() -> None:
    """As in NiT and REPA, the time at which a step begins decides, not the one at which the network is asked."""
    net, flow, batch = Toy(), linear_flow(), batches()["packed"]
    field = flow.field(net, guided(interval=[0.0, 0.7]))
    SAMPLERS["heun"](field, batch, flow.times(4), SeededNoise(batch))
    assert [(t[0], len(y)) for y, t in net.calls] == [
        (1.0, 3), (0.75, 3), (0.75, 3), (0.5, 3), (0.5, 6), (0.25, 6), (0.25, 6)
    ]  # fmt: skip


def test_each_slope_is_guided_by_its_own_time() -> None:
    net, flow, batch = Toy(), linear_flow(), batches()["packed"]
    field = flow.field(net, guided(interval=[0.0, 0.7]))
    SAMPLERS["heun"](field, batch, flow.times(4), SeededNoise(batch), guidance_at="slope")
    assert [(t[0], len(y)) for y, t in net.calls] == [
        (1.0, 3), (0.75, 3), (0.75, 3), (0.5, 6), (0.5, 6), (0.25, 6), (0.25, 6)
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"sampler\.guidance_at=stage is unknown; choose one of step, slope"):
        sampler_of("heun", guidance_at="stage")


@pytest.mark.parametrize(
    ("interval", "t", "acts"),
    [
        ([0.0, 1.0], 0.0, True), ([0.0, 1.0], 1.0, True), ([0.25, 0.75], 0.25, False), ([0.25, 0.75], 0.75, False),
        ([0.25, 0.75], 0.5, True), ([0.0, 0.75], 0.0, True), ([0.0, 0.75], 0.75, False), ([0.25, 1.0], 1.0, True),
    ],
)  # fmt: skip
def test_open_ends_are_strict_but_at_data_and_noise(interval: list[float], t: float, acts: bool) -> None:
    assert cfg(Toy(), interval=interval, ends="open").acts(t) is acts


@pytest.mark.parametrize("layout", ["dense", "padded", "packed", "static"])
@pytest.mark.parametrize("channels", ["all", "first3"])
@pytest.mark.parametrize("t", [0.3, 0.9])
def test_a_doubled_state_has_the_same_first_half(layout: str, channels: str, t: float) -> None:
    """The second half has the null output where nothing is guided."""
    batch, options = batches()[layout], {"channels": channels, "interval": [0.0, 0.5]}
    single = cfg(Toy(), **options)(batch, t)
    first, second = cfg(Toy(), doubled=True, **options)(doubled(batch, NULL), t).chunk(2)
    torch.testing.assert_close(first, single)
    if channels == "all":
        assert torch.equal(first, second)
    else:
        _, null = both(Toy(), batch, t)
        axis = 1 if layout == "dense" else -1
        assert torch.equal(second.narrow(axis, 3, 1), null.narrow(axis, 3, 1))
        torch.testing.assert_close(second.narrow(axis, 0, 3), single.narrow(axis, 0, 3))


class Weaker(Toy):
    """Half of what the other one says."""

    def forward(self, batch: Batch, t: Tensor) -> Tensor:
        return super().forward(batch, t) / 2


def auto(net: Toy, weak: Toy, **options: Any) -> AutoGuidance:
    options = {**OPTIONS, "scale": 3.0, "interval": [0.0, 0.6], **options}
    return AutoGuidance(TimeAdapter(net), guide=TimeAdapter(weak), **options)


def test_autoguidance_extrapolates_from_a_weaker_network() -> None:
    batch, strong, weak = batches()["packed"], Toy(), Weaker()
    conditional, _ = both(Toy(), batch, 0.3)
    torch.testing.assert_close(auto(strong, weak)(batch, 0.3), conditional / 2 + 3 * (conditional - conditional / 2))
    assert [len(y) for y, _ in strong.calls + weak.calls] == [3, 3]
    assert weak.calls[0][0] == [1, 5, 7]
    auto(strong, weak)(batch, 0.61)
    assert (len(strong.calls), len(weak.calls)) == (2, 1)  # outside the interval the weaker one rests


def test_the_weaker_network_may_be_told_the_null_label() -> None:
    weak = Weaker()
    auto(Toy(), weak, labels="null_label")(batches()["packed"], 0.3)
    assert weak.calls[0][0] == [NULL] * 3
    weak.null_label = None
    with pytest.raises(ValueError, match=r"guidance\.labels=null_label needs"):
        auto(Toy(), weak, labels="null_label")


def test_a_guide_may_count_time_in_the_other_direction() -> None:
    """Each network is asked in its own time."""
    flow, batch = linear_flow(), batches()["packed"]
    forward, backward = (functools.partial(AutoGuidance, guide=flow.adapt(Toy(time=t)), **OPTIONS) for t in TIMES)
    same, other = (flow.field(Toy(), guidance).velocity(batch, 0.25) for guidance in (forward, backward))
    assert torch.equal(same, other)


@pytest.mark.parametrize(
    ("key", "choices"), [("ends", "inclusive, strict"), ("schedule", "constant, linear, power_cosine")]
)
def test_unknown_options_are_refused(key: str, choices: str) -> None:
    with pytest.raises(ValueError, match=rf"guidance\.{key}=wrong is unknown; choose one of {choices}"):
        cfg(Toy(), **{key: "wrong"})


def test_integer_steps_have_one_direction_whatever_the_network_declares() -> None:
    objective = gaussian(variance="fixed_small")
    doubled_calls = {}
    for time in ("index", "data1"):
        net = Toy(time=time)
        field = objective.field(net, guided(interval=[0.0, 0.3]))
        field.velocity(batches()["packed"], 900.0)
        field.velocity(batches()["packed"], 100.0)
        doubled_calls[time] = [(t[0], len(y)) for y, t in net.calls]
    assert doubled_calls["index"] == doubled_calls["data1"] == [(900.0, 3), (100.0, 6)]


def test_the_linear_schedule() -> None:
    linear = cfg(Toy(), scale=3.0, schedule="linear")
    assert [linear.scale_at(level) for level in (0.0, 0.25, 1.0)] == [1.0, 1.5, 3.0]


def test_the_weaker_network_must_have_the_same_tokens_and_classes() -> None:
    with pytest.raises(ValueError, match=r"guidance\.weights: its tokens are .*patch_size=2"):
        auto(Toy(), Toy(patch_size=2))
    fewer = Toy()
    fewer.null_label = 5
    with pytest.raises(ValueError, match=r"guidance\.weights: it has 5 classes, and this network 10"):
        auto(Toy(), fewer)
    auto(Toy(), fewer, labels="null_label")
