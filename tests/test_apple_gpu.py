"""On an Apple GPU, simulated, everything is what it is on the CPU, to the bit; float64 is nowhere on it."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from genfound import build
from genfound.backbones.base import TokenSpec
from genfound.batch import Batch
from genfound.callbacks import throughput
from genfound.config import compose
from genfound.layers import float64
from genfound.layers.rope import RULES, Rope
from genfound.layouts import Packed
from genfound.metrics.feature_metric import FeatureMetric
from genfound.metrics.frechet import FrechetDistance, Moments, frechet_distance
from genfound.metrics.inception_score import InceptionScore, adm_score, torch_fidelity_score
from genfound.metrics.kid import KernelDistance, kernel_distance
from genfound.metrics.precision_recall import PrecisionRecall, shares_of_one_radius
from genfound.modules.base import module_of, validation_sums
from genfound.objectives.base import Objective
from genfound.objectives.interpolants import INTERPOLANTS
from genfound.rng import Rng
from genfound.samplers.log_likelihood import log_likelihood
from genfound.sampling.pipeline import Pipeline
from genfound.sampling.requests import SampleRequest
from genfound.tokenizers import LatentSpec, PixelTokenizer
from genfound.training import fit
from tests.apple_gpu import apple_gpu
from tests.evaluation.runs import evaluated, untrained_run
from tests.helpers import (
    ALIGNED,
    composed,
    guidance_of,
    latents,
    linear_flow,
    packed,
    run_dir,
    sampler_of,
    small_nit,
    state_differences,
)
from tests.samplers.test_ddpm import objective as gaussian
from tests.samplers.toys import SeededNoise
from tests.stores import contents, encoded, tree
from tests.test_models import SHORT, TINY

USERS = (
    "layers.rope",
    "objectives.base",
    "modules.base",
    "metrics.frechet",
    "metrics.feature_metric",
    "sampling.pipeline",
)
"""Of `float64_device`, by name."""


@pytest.fixture(autouse=True)
def _norms_of_all_images_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU; on the CPU those of each image round otherwise."""
    monkeypatch.setattr("genfound.layers.adaln.OWN_CALL", math.inf)


def on_both(function: Callable[[torch.device], Any]) -> tuple[Any, Any]:
    """What a function of a device gives on the CPU, and on the GPU."""
    with sdpa_kernel(SDPBackend.MATH):
        on_cpu = function(torch.device("cpu"))
    with apple_gpu():
        return on_cpu, function(torch.device("mps"))


def same(one: Any, other: Any) -> bool:
    """Whether tensors are equal to the bit, wherever they are."""
    if isinstance(one, Tensor):
        return torch.equal(one, other.cpu())
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def equal(function: Callable[[torch.device], Any]) -> None:
    """A function of a device gives the same on both."""
    one, other = on_both(function)
    with apple_gpu():
        assert same(one, other)


@pytest.fixture(autouse=True)
def _no_gauge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "matmul_rate", lambda device: 1e12)


def metrics(folder: Path) -> list[dict[str, float]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if not key.startswith("perf/")} for line in lines]


RUNS = {
    **{name: [f"model={name}"] for name in TINY},
    "aligned": ["model=nit_tiny", *ALIGNED],
    "muon": ["model=sit_tiny", "optimizer=muon"],
    "gaussian": ["model=nit_tiny", "objective=gaussian"],
    "encoded": [
        "model=nit_tiny",
        "tokenizer=dc_ae",
        "tokenizer.weights=random_tiny",
        "model.patch_size=1",
        "data.sides=[32,64]",
    ],
}
QUICK = {"nit_tiny", "dit_tiny", "aligned", "muon"}
OFTEN = ["callbacks.validation.every=1", "callbacks.preview.every=8", "trainer.precision=fp32", "ema.decays=[0.9]"]


def trained(name: str, folder: Path, device: torch.device, steps: int = 2) -> Path:
    chosen = [f"trainer.accelerator={device.type}", f"trainer.max_steps={steps}"]
    folder = run_dir(folder / device.type, *RUNS[name], *SHORT, *OFTEN, *chosen)
    fit(folder)
    return folder


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in RUNS])
def test_a_training_is_that_of_the_cpu(name: str, tmp_path: Path) -> None:
    """With its validation, averages, previews and checkpoints."""
    cpu, gpu = on_both(partial(trained, name, tmp_path))
    assert metrics(cpu) == metrics(gpu)
    assert not state_differences(cpu, gpu)
    pictures = [sorted((folder / "samples").glob("*.png")) for folder in (cpu, gpu)]
    assert pictures[0] and [a.read_bytes() for a in pictures[0]] == [b.read_bytes() for b in pictures[1]]


def test_a_training_goes_on_with_the_checkpoint_of_a_cpu(tmp_path: Path) -> None:
    with sdpa_kernel(SDPBackend.MATH):
        straight = trained("nit_tiny", tmp_path / "straight", torch.device("cpu"))
        shutil.copytree(trained("nit_tiny", tmp_path / "resumed", torch.device("cpu"), 1), tmp_path / "resumed" / "mps")
    with apple_gpu():
        assert not state_differences(straight, trained("nit_tiny", tmp_path / "resumed", torch.device("mps")))


@pytest.mark.parametrize("optimizer", ["adamw_nit", "muon"])
def test_a_step_that_is_not_finite_changes_nothing(optimizer: str) -> None:
    """Fused AdamW does not look at `found_inf` there."""
    module = module_of(build.build_run(composed("model=nit_tiny", f"optimizer={optimizer}", "optimizer.lr=1"), 1))
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    with apple_gpu():
        module.to("mps")
        own = module.configure_optimizers()
        for size in (torch.inf, 1.0):
            for parameter in module.parameters():
                parameter.grad = torch.full_like(parameter, size)
            module.configure_gradient_clipping(own)
            own.step()
            changed = [name for name, p in module.named_parameters() if not torch.equal(p.detach().cpu(), before[name])]
            assert bool(changed) is (size == 1)


LAYOUTS = {name: build.net(composed(f"model={name}"), LatentSpec(3, 1), 10).layouts for name in TINY}


@pytest.mark.parametrize(("model", "layout"), [(name, layout) for name in TINY for layout in LAYOUTS[name]])
def test_losses_and_gradients_are_those_of_the_cpu(model: str, layout: str) -> None:
    """Of training and of validation, in every layout of a network."""
    config = composed(f"model={model}", "model.depth=2")
    static = {"padded": {"max_tokens": 100}, "packed": {"max_tokens": 200, "max_images": 4}}.get(layout, {})
    arranged = build.sampling_layout({**config, "layout": compose.read_option("layout", layout)}, **static)
    objective, sizes = build.objective(config), [(16, 16)] * 2 if layout == "dense" else [(16, 16), (12, 16)]

    def step(device: torch.device) -> Any:
        net = build.net(config, LatentSpec(3, 1), num_classes=10)
        for number, parameter in enumerate(net.parameters()):  # those that begin as zeros would hide the blocks
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) / 10
        batch = arranged.to_batch(latents(sizes, 3), torch.tensor([1, 2])).to(device)
        if net.text_width is not None:
            text = [Rng(0).normal(f"{n}", (n, net.text_width), device) for n in (3, 5)]
            batch = batch.with_text(text, net.text_tokens)
        losses = objective.loss(net.to(device), batch, Rng(0))
        losses.total.sum().backward()
        item = Held(batch, Rng(1).normal("noise", batch.x.shape, device))
        with torch.no_grad():
            sums = validation_sums(net, objective, item)  # type: ignore[arg-type]
        gradients = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
        return {"total": losses.total, "t": losses.t, **losses.terms, "sums": sums, "gradients": gradients}

    equal(step)


class Held:
    """Two held-out images, and their noise."""

    def __init__(self, images: Batch, noise: Tensor) -> None:
        self.images, self.noise = images, noise
        self.micro, self.counts = self, 1
        self.positions = [3, 4]


FLOWS: list[dict[str, Any]] = [
    *({"path": path, "prediction": "x0", "weighting": "min_snr"} for path in INTERPOLANTS),
    {"prediction": "score", "weighting": "likelihood", "time": "uniform"},
    {"prediction": "noise", "weighting": "velocity", "time": "log_normal"},
    {"directional": 0.5, "time_shift": "auto", "noise_scale": 2.0},
    {"time": "logit_normal", "time_window": [0.2, 0.4], "time_shift": 3.0},
    {"time": "uniform", "time_window": [0.2, 0.4], "time_window_share": 0.5},
]
GAUSSIANS: list[dict[str, Any]] = [
    *({"loss": loss, "variance": "learned_range"} for loss in ("hybrid", "rescaled_mse", "kl")),
    {"loss": "kl", "variance": "fixed_large"}, {"loss": "mse", "elbo_weight": 0.1}, {"loss": "mse", "prediction": "x0"},
]  # fmt: skip


@pytest.mark.parametrize("objective", [*map(str, FLOWS), *map(str, GAUSSIANS)])
def test_what_objectives_compute_is_that_of_the_cpu(objective: str) -> None:
    options = dict(zip(map(str, FLOWS + GAUSSIANS), FLOWS + GAUSSIANS, strict=True))[objective]
    made: Objective = (gaussian if options in GAUSSIANS else linear_flow)(**options)
    both = made.learned_variance

    class Net:
        token_spec = TokenSpec(4, 1)

        def __call__(self, batch: Batch, t: Tensor) -> Tensor:
            out = batch.x.sin() + batch.expand(t / (1 + t))
            return torch.cat([out, out / 2], dim=-1) if both else out

    def losses(device: torch.device) -> Any:
        batch = packed([(4, 4), (2, 6)], max_tokens=40, max_images=3).to(device)
        found = made.loss(Net(), batch, Rng(0))
        noise, time = Rng(1).normal("noise", batch.x.shape, device), torch.tensor([0.1, 0.9, 0.5, 0.5]).double()
        return found.total, found.t, found.terms, made.velocity_error(Net(), batch, time, noise)

    equal(losses)


@pytest.mark.parametrize("rule", RULES)
def test_positions_are_those_of_the_cpu(rule: str) -> None:
    places, sizes = torch.cartesian_prod(torch.arange(3), torch.arange(2)), torch.tensor([[24, 8], [4, 20]])
    for target, decouple in ((None, True), ([32, 16], False)):
        rope = Rope(16, 100.0, rule, 16, target, decouple, exact=False)
        equal(lambda device, own=rope: own(places.to(device), sizes.to(device), lambda v: v[:1].expand(6, -1)))


WALKS: list[tuple[str, str, dict[str, Any]]] = [
    ("flow", "euler", {"shift": "auto"}), ("flow", "heun", {}), ("flow", "dopri5", {"norm": "image", "clip": True}),
    ("flow", "dopri5", {"method": "midpoint"}), ("flow", "sde", {}), ("flow", "sde", {"method": "heun"}),
    ("flow", "dpm_solver", {}), ("gaussian", "ddpm", {}), ("gaussian", "ddim", {"eta": 0.5}),
    ("gaussian", "euler", {}), ("gaussian", "heun", {}), ("gaussian", "dopri5", {"method": "heun2"}),
    ("gaussian", "dpm_solver", {"spacing": "karras"}), ("x0", "dpm_solver", {"predicts": "noise"}),
    ("score", "sde", {}),
]  # fmt: skip
GUIDANCES: list[tuple[str, dict[str, Any]]] = [
    ("none", {}), ("cfg", {"scale": 2.0}), ("cfg", {"scale": 2.0, "doubled": True}), ("autoguidance", {"scale": 2.0}),
]  # fmt: skip
CASES = [*((walk, GUIDANCES[1]) for walk in WALKS), *((WALKS[1], guide) for guide in GUIDANCES)]
REQUESTS = [SampleRequest(n % 10, ((8, 8), (4, 12))[n % 2], n) for n in range(3)]


@pytest.mark.parametrize(("walk", "guide"), CASES)
def test_samples_are_those_of_the_cpu(walk: tuple[str, str, dict[str, Any]], guide: tuple[str, dict[str, Any]]) -> None:
    kind, name, options = walk
    steps = {"ddpm": 4, "ddim": 4, "dopri5": 3}.get(name, 3)
    objective = gaussian() if kind == "gaussian" else linear_flow(**({} if kind == "flow" else {"prediction": kind}))

    def images(device: torch.device) -> Any:
        net, weaker = (small_nit(channels=3, patch_size=2, width=width).eval().to(device) for width in (32, 16))
        guided = guidance_of(guide[0], **guide[1])
        if guide[0] == "autoguidance":
            guided = partial(guided, guide=objective.adapt(weaker))  # type: ignore[arg-type]
        chosen = sampler_of(name, steps=steps, **options)
        drawing = Pipeline(
            objective, PixelTokenizer(), Packed(2), chosen, guided, 2, "32-true", "round", device
        )  # fmt: skip
        found = drawing.latents(net, REQUESTS, seed=0)
        assert {z.device.type for z in found} == {device.type}
        return found, list(map(np.ndarray.tolist, drawing(net, REQUESTS[:1], seed=0)))

    equal(images)


def test_likelihoods_are_those_of_the_cpu() -> None:
    times = torch.linspace(0, 1, 3).double()

    def nats(device: torch.device) -> Any:
        batch, net = packed([(4, 4), (2, 6)], patch_size=2), small_nit(patch_size=2).to(device)
        found, noise = log_likelihood(linear_flow().field(net), batch, times, SeededNoise(batch), method="euler")
        return found, noise.x

    equal(nats)


FEATURES = [torch.randn(60, 5, generator=torch.Generator().manual_seed(seed)) + seed / 4 for seed in range(2)]
METRICS: dict[str, Callable[[], FeatureMetric]] = {
    "frechet": lambda: FrechetDistance(5),
    "inception": lambda: InceptionScore(None),
    "inception_adm": lambda: InceptionScore(25),
    "kid": lambda: KernelDistance(subsets=3, size=20),
    "precision": PrecisionRecall,
}


@pytest.mark.parametrize("name", METRICS)
def test_metrics_stay_on_the_host(name: str) -> None:
    def computed(device: torch.device) -> Any:
        holder = nn.ModuleDict({"metric": METRICS[name]()}).to(device)  # as in a LightningModule
        metric: Any = holder["metric"]
        for _ in range(2):
            metric.reset()
            metric.update(FEATURES[0].to(device))
            if "inception" not in name:
                metric.update(FEATURES[1].to(device), real=True)
        assert metric.device.type == "cpu"
        return metric.compute()

    equal(computed)


def test_figures_of_features_on_the_gpu_are_those_of_the_cpu() -> None:
    def figures(device: torch.device) -> Any:
        samples, real = (features.to(device) for features in FEATURES)
        distance = frechet_distance(Moments.of(samples).gaussian(), Moments.zero(5, device).of(real).gaussian())
        scores = adm_score(samples, 25), torch_fidelity_score(samples), kernel_distance(samples, real, 3, 20)
        return distance, *map(tuple, scores), *shares_of_one_radius(real, samples, 3, half=False)

    equal(figures)


@pytest.mark.parametrize("name", ["dc_ae", "sd_vae", "vq_f4"])
def test_autoencoders_are_those_of_the_cpu(name: str) -> None:
    """To rounding, since norms of groups have a form of the CPU's own for channels that are last in memory."""

    def there_and_back(device: torch.device) -> list[Tensor]:
        codec: Any = build.tokenizer(composed(f"tokenizer={name}", "tokenizer.weights=random_tiny"))
        z = codec.encode(Rng(0).uniform("images", (2, 3, 64, 64), device) * 2 - 1)
        return [z, codec.decode(z), *([codec.quantise(z)] if name == "vq_f4" else [])]

    one, other = on_both(there_and_back)
    with apple_gpu():
        for a, b in zip(one, other, strict=True):
            assert b.device.type == "mps"
            torch.testing.assert_close(b.cpu(), a, atol=1e-4, rtol=1e-3)


def test_an_evaluation_is_that_of_the_cpu(tmp_path: Path) -> None:
    """To rounding, as autoencoders: the probe has norms of groups."""
    run = untrained_run(tmp_path / "run")

    def figures(device: torch.device) -> dict[str, float]:
        out = {"out": str(tmp_path / device.type), "accelerator": device.type, "sizes": [16, 16]}
        (result,) = evaluated(run, tmp_path / "references", **out)
        return result.figures

    cpu, gpu = on_both(figures)
    assert gpu == pytest.approx(cpu, rel=1e-6)


def test_a_store_is_that_of_the_cpu(tmp_path: Path) -> None:
    images, chosen = tree(tmp_path / "images", 9), ["tokenizer=dc_ae", "tokenizer.weights=random_tiny", "patch_size=1"]
    cpu, gpu = on_both(lambda device: encoded(images, tmp_path / device.type, *chosen, device=device))
    stores = [{name: data for name, data in contents(out).items() if name != "log"} for out in (cpu, gpu)]
    assert stores[0] and stores[0] == stores[1]


def test_numbers_drawn_for_the_gpu_are_those_of_the_cpu() -> None:
    equal(lambda device: [getattr(Rng(0), law)("x", (4,), device) for law in ("normal", "uniform")])


@pytest.mark.parametrize("part", ["validation", "times", "positions", "samples", "metrics"])
def test_float64_on_the_gpu_would_be_noticed(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were it put where it is on other devices, each of these would end."""
    for module in (float64, *(sys.modules[f"genfound.{name}"] for name in USERS)):
        monkeypatch.setattr(module, "float64_device", lambda device: device, raising=False)
    tests: dict[str, Callable[[], None]] = {
        "validation": lambda: test_losses_and_gradients_are_those_of_the_cpu("dit_tiny", "dense"),
        "times": lambda: test_what_objectives_compute_is_that_of_the_cpu(str(FLOWS[0])),
        "positions": lambda: test_positions_are_those_of_the_cpu("yarn"),
        "samples": lambda: test_samples_are_those_of_the_cpu(WALKS[1], GUIDANCES[0]),
        "metrics": lambda: test_metrics_stay_on_the_host("frechet"),
    }
    with pytest.raises(TypeError, match="float64"):
        tests[part]()
