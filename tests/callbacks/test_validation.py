"""Validation shows each held-out image once, and its figures depend on nothing but the images and the weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from genfound import build
from genfound.callbacks.ema import Ema
from genfound.data.datamodule import GenerativeDataModule
from genfound.data.packing import budget
from genfound.data.packing.order import Order
from genfound.modules.base import TIMES, GenerativeModule, uniform_times, validation_metrics, validation_sums
from genfound.tokenizers import PixelTokenizer
from tests.helpers import composed, randomise, training_module

FIT = ("model=fitv2_tiny", "model.width=32", "model.depth=1", "model.heads=2", "model.adaln_rank=8")
NIT = ("model=nit_tiny", "model.width=32", "model.depth=1", "model.heads=1")
DIT = ("model=dit_tiny", "model.width=32", "model.depth=1", "model.heads=1", "data.batch_size=16", "batch.images=16")
NAMES = {"val/loss", "val/velocity_mse", "val/loss_ema", "val/velocity_mse_ema"}


class Noisy(PixelTokenizer):
    """Like an autoencoder that draws latents from its posterior."""

    stochastic = True

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        assert noise is not None
        return images + 0.3 * noise


def built(*overrides: str) -> build.RunComponents:
    config = composed("data.images=500", "data.holdout=150", "data.max_tokens=256", *overrides)
    return replace(build.build_run(config, 1), tokenizer=Noisy())


def module_of(parts: build.RunComponents) -> tuple[GenerativeModule, Ema]:
    module = training_module(randomise(parts.net), objective=parts.objective)  # type: ignore[arg-type]
    ema = Ema([0.5])
    ema.averages = {0.5: {name: 0.5 * p.detach() for name, p in module.net.named_parameters() if p.requires_grad}}
    return module, ema


def sums(parts: build.RunComponents, module: GenerativeModule, rank: int, ranks: int) -> Tensor:
    data = GenerativeDataModule(parts)
    data.validate_on(25)
    data.val.rank, data.val.ranks = rank, ranks
    total = torch.zeros(4, dtype=torch.float64)
    module.eval()
    for item in data.val:
        on_device = data.transfer_batch_to_device(item, torch.device("cpu"), 0)
        total += validation_sums(module.net, module.objective, on_device)
    return total


@torch.no_grad()
def figures(*overrides: str, ranks: int = 1) -> dict[str, float]:
    parts = built(*overrides)
    module, ema = module_of(parts)
    found = validation_metrics(sum(sums(parts, module, rank, ranks) for rank in range(ranks)))
    with ema.ema_weights(module):
        average = validation_metrics(sum(sums(parts, module, rank, ranks) for rank in range(ranks)))
    return found | {f"{name}_ema": value for name, value in average.items()}


@pytest.mark.parametrize("options", [(*NIT, "data.max_tokens=128"), NIT, FIT, DIT], ids=["small", "nit", "fit", "dit"])
@pytest.mark.parametrize("wanted", [45, 1000])
def test_the_first_images_of_a_fixed_order_are_shown_once_each(options: tuple[str, ...], wanted: int) -> None:
    parts, order = built(*options), Order(150, 0)
    micros, count = parts.validation(wanted), min(wanted, 150)
    assert [k for micro in micros for k in micro.positions] == list(range(count))
    assert [i for micro in micros for i in micro.indices] == [order[k] for k in range(count)]
    assert [micro.number for micro in micros] == list(range(len(micros)))
    tokens = budget.token_counts(parts.held_out, parts.tokenizer.spec, parts.layout.patch_size)
    assert all(micro.tokens == tokens[list(micro.indices)].sum() for micro in micros)
    shapes = {images.x.shape for images, _ in map(GenerativeDataModule(parts).val.batches.__getitem__, micros)}
    assert len(shapes) == 1 or parts.layout.name == "padded"  # so that a compiled network is compiled once


EQUAL = {
    "nit": [*[(*NIT, f"data.max_tokens={n}", f"batch.packs={p}") for n, p in ((128, 1), (1024, 4))]],
    "nit_token": [(*NIT, "objective.weight=token", f"data.max_tokens={n}") for n in (128, 1024)],
    "fit": [(*FIT, f"layout={name}", f"data.max_tokens={n}") for name in ("packed", "padded") for n in (128, 1024)],
    "fit_square": [(*FIT, "data.view=square", f"layout={name}") for name in ("packed", "padded", "dense")],
    "window": [
        (*NIT, "objective.time_window=[0.2,0.6]", "objective.time_window_share=0.5", f"data.max_tokens={n}")
        for n in (128, 1024)
    ],
    "dit": [(*DIT, "data.batch_size=16"), (*DIT, "data.batch_size=8")],
}


@pytest.mark.parametrize("case", EQUAL)
def test_the_figures_are_those_of_any_packing_layout_and_number_of_ranks(case: str) -> None:
    first, *others = EQUAL[case]
    wanted = figures(*first, "seed=0")
    assert wanted.keys() == NAMES and all(value > 0 for value in wanted.values())
    assert wanted["val/loss"] != pytest.approx(wanted["val/loss_ema"], rel=1e-3)
    for options in others:
        assert figures(*options) == pytest.approx(wanted, rel=1e-5)
    for ranks in (2, 100):  # also more than there are micro-batches
        assert figures(*first, ranks=ranks) == pytest.approx(wanted, rel=1e-5)


class Counting(Noisy):
    """A network, of which one knows how many images it has encoded."""

    online, encoded = True, 0

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        Counting.encoded += len(images)
        return super().encode(images, noise)


def test_a_held_out_image_is_encoded_once_for_all_weights_and_all_validations() -> None:
    parts = built(*NIT)
    data, device = GenerativeDataModule(replace(parts, tokenizer=Counting())), torch.device("cpu")
    data.validate_on(25)
    first, second = ([data.transfer_batch_to_device(item, device, 0) for item in data.val] for _ in range(2))
    assert Counting.encoded == 25
    plain = GenerativeDataModule(parts)
    plain.validate_on(25)
    for item, again, straight in zip(first, second, plain.val, strict=True):
        expected = plain.transfer_batch_to_device(straight, device, 0)
        assert all(torch.equal(one.images.x, expected.images.x) for one in (item, again))
        assert all(torch.equal(one.noise, expected.noise) for one in (item, again))


def test_times_of_the_velocity_error_are_uniform_and_keep_from_the_poles() -> None:
    times = uniform_times(range(1000))
    assert torch.equal(uniform_times([7, 3]), times[[7, 3]])
    low, high = TIMES
    expected = low + (high - low) * (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    assert (times.sort().values - expected).abs().max() < 2e-3
