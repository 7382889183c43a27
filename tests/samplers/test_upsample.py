"""Guidance of larger images by smaller ones: what it asks the network, what each option does, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from genfound import build
from genfound.backbones.base import Backbone, TokenSpec
from genfound.batch import Batch
from genfound.layouts import Dense
from genfound.objectives.gaussian import Gaussian
from genfound.sampling.pipeline import Pipeline
from genfound.sampling.requests import SampleRequest
from genfound.tokenizers.pixel import PixelTokenizer
from tests.helpers import composed, guidance_of, latents, linear_flow

BATCH = Dense(1).to_batch(latents([(8, 8)] * 2), torch.tensor([1, 2]))


class Toy(Backbone):
    """A noise that depends on state, time and label; remembers the sizes and times of its calls."""

    layouts = ("dense",)
    token_spec, null_label = TokenSpec(4, 1), 10

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int, float]] = []

    def forward(self, batch: Batch, t: Tensor) -> Tensor:
        self.calls.append((batch.x.shape[-1], t[0].item()))
        return batch.x.tanh() + batch.expand(batch.y.float() / 10 + t / 1000)


def objective(**options: Any) -> Gaussian:
    own = {key: value for key, value in composed("objective=gaussian_dim")["objective"].items() if key[0] != "_"}
    return Gaussian(**{**own, **options})


def guided(t: float, **options: Any) -> tuple[Tensor, list[tuple[int, float]]]:
    net = Toy()
    field = objective().field(net, guidance_of("upsample", **options))
    return field.net(BATCH, t), net.calls


def test_means_become_those_of_the_small_image() -> None:
    out, calls = guided(949.0)
    assert [side for side, _ in calls] == [8, 4] and calls[1][1] < calls[0][1] == 949
    small = avg_pool2d(BATCH.x, 2)
    signal = objective().process.tables.alphas_cumprod[949].item()
    variance = signal + (1 - signal) / 4
    noise = guidance_of("cfg", scale=4.0, interval=[0.0, 1.0], channels="all")
    assert noise is not None
    low = Dense(1).to_batch(list(small / variance**0.5), BATCH.y)
    expected = objective().field(Toy(), noise).net(low, calls[1][1]) / 2
    torch.testing.assert_close(avg_pool2d(out, 2), expected, atol=1e-5, rtol=1e-5)


def test_the_small_image_is_as_noisy_as_its_step_says() -> None:
    _, calls = guided(949.0)
    signal = objective().process.tables.alphas_cumprod
    (_, there), (_, here) = calls
    ratios = [signal[int(t)] / (1 - signal[int(t)]) for t in (there, here)]
    assert ratios[1] / ratios[0] == pytest.approx(4, rel=0.02)
    _, calls = guided(949.0, factor=4)
    assert calls[1][0] == 2 and calls[1][1] < here


def test_it_acts_on_its_share_of_the_way_alone() -> None:
    plain = guidance_of("cfg", scale=4.0, interval=[0.0, 1.0], channels="all")
    out, calls = guided(690.0)
    assert len(calls) == 1 and torch.equal(out, objective().field(Toy(), plain).net(BATCH, 690.0))
    assert len(guided(690.0, share=0.4)[1]) == 2
    assert torch.equal(guided(949.0, strength=0.0)[0], objective().field(Toy(), plain).net(BATCH, 949.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factor": 1}, "guidance.factor=1 must be a whole number of at least 2"),
        ({"share": 2.0}, "guidance.share=2.0 must be a finite number of at least 0 and at most 1"),
        ({"strength": "much"}, "guidance.strength=much must be a finite number"),
    ],
)
def test_what_is_no_option_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        objective().field(Toy(), guidance_of("upsample", **options))
    assert str(error.value) == message


def test_what_cannot_be_guided_so_is_refused() -> None:
    needed = "guidance=upsample needs objective=gaussian with objective.prediction=epsilon"
    for other in (linear_flow(), objective(prediction="x0")):
        with pytest.raises(ValueError, match=needed):
            other.field(Toy(), guidance_of("upsample"))
    of_packs = Toy()
    of_packs.layouts = ("packed",)
    with pytest.raises(ValueError, match=r"^guidance=upsample needs a model of layout=dense; choose guid"):
        objective().field(of_packs, guidance_of("upsample"))


def test_images_are_dense_whatever_the_layout_of_the_training_was() -> None:
    config = composed("model=dim_tiny", "layout=packed", "guidance=upsample", "sampler.steps=2")
    pixels, goal = PixelTokenizer(), build.objective(config)
    net = build.net(config, pixels.spec, 10)
    pipeline = Pipeline.from_config(config, goal, pixels, torch.device("cpu"), 1)
    assert pipeline(net, [SampleRequest(0, (8, 12), 0)], 0)[0].shape == (8, 12, 3)
    made = r"tokenizer stride x patch x guidance\.factor"
    with pytest.raises(ValueError, match=rf"^size=\[8,10\]: height and width must be multiples of 4 pixels \({made}\)"):
        pipeline(net, [SampleRequest(0, (8, 10), 0)], 0)
