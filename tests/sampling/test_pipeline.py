from __future__ import annotations

import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

import genfound
from genfound import build
from genfound.config import compose
from genfound.layouts import Packed
from genfound.objectives.base import Objective
from genfound.sampling.pipeline import Pipeline
from genfound.sampling.requests import SampleRequest, check_size, label_number, make_requests
from genfound.tokenizers import LatentSpec, PixelTokenizer, Undecodable
from genfound.tokenizers.vq_f4 import VQF4
from tests.evaluation.runs import untrained_run
from tests.helpers import composed, guidance_of, linear_flow, sampler_of, small_nit
from tests.samplers.test_ddpm import objective as gaussian

NAMES = ["circle", "square", "star"]


def sampling(micro_batch: int = 4) -> Pipeline:
    guidance = guidance_of("cfg", scale=2.0, interval=[0.2, 0.8])
    sampler = sampler_of("heun", steps=3)
    device = torch.device("cpu")
    return Pipeline(
        linear_flow(), PixelTokenizer(), Packed(2), sampler, guidance, micro_batch, "32-true", "round", device
    )


REQUESTS = [SampleRequest(n % 10, ((8, 8), (4, 12), (8, 8))[n % 3], n) for n in range(9)]
NET = small_nit(channels=3, patch_size=2).eval()


def test_images_have_the_requested_sizes_in_the_requested_order() -> None:
    finished: list[float] = []
    images = sampling()(NET, REQUESTS, seed=0, progress=lambda done, _: finished.append(done))
    assert [image.shape for image in images] == [(*request.size, 3) for request in REQUESTS]
    assert all(image.dtype == np.uint8 for image in images)
    assert [done for done in finished if done == int(done)] == [0, 3, 7, 9]
    assert sorted(set(finished)) == finished and len(finished) == 4 + 3 * 3  # and after each step


def test_a_walk_begins_with_the_noise_of_its_objective() -> None:
    loud, still = linear_flow(noise_scale=2.0), sampler_of("euler", steps=1)
    one, two = (replace(sampling(), objective=o, sampler=still, guidance=None) for o in (linear_flow(), loud))
    idle = small_nit(channels=3, patch_size=2).eval()
    torch.nn.init.zeros_(idle.final_layer.linear.weight)
    torch.nn.init.zeros_(idle.final_layer.linear.bias)
    quiet, louder = (pipeline.latents(idle, REQUESTS[:2], seed=0) for pipeline in (one, two))
    assert all(torch.equal(2 * a, b) for a, b in zip(quiet, louder, strict=True))


def test_an_image_does_not_depend_on_the_others() -> None:
    together = sampling()(NET, REQUESTS, seed=0)
    for subset in ([4], [8, 0, 3], [7, 1]):
        alone = sampling()(NET, [REQUESTS[n] for n in subset], seed=0)
        for n, image in zip(subset, alone, strict=True):
            assert np.array_equal(image, together[n])


def test_adaptive_steps_couple_no_images_where_each_goes_alone() -> None:
    adaptive = sampler_of("dopri5", norm="image", rtol=1e-2)
    together = replace(sampling(), sampler=adaptive).latents(NET, REQUESTS[:4], seed=0)
    alone = replace(sampling(16), sampler=adaptive).latents(NET, REQUESTS[2:3], seed=0)
    assert torch.equal(alone[0], together[2])


def test_the_network_always_sees_full_micro_batches() -> None:
    """Matrix kernels round differently for another number of rows."""
    seen: list[int] = []
    handle = NET.register_forward_pre_hook(lambda _module, arguments: seen.append(len(arguments[0].y)))
    sampling()(NET, REQUESTS, seed=0)
    handle.remove()
    assert set(seen) == {4, 8}  # twice as many where guidance acts


def test_another_micro_batch_changes_rounding_only() -> None:
    for few, many in zip(sampling(2)(NET, REQUESTS, 0), sampling(7)(NET, REQUESTS, 0), strict=True):
        assert np.abs(few.astype(int) - many.astype(int)).max() <= 1


def test_seed_number_and_label_matter() -> None:
    base = SampleRequest(1, (8, 8), 0)
    images = [
        sampling()(NET, [base], 0)[0],
        sampling()(NET, [base], 1)[0],
        sampling()(NET, [SampleRequest(2, (8, 8), 0)], 0)[0],
        sampling()(NET, [SampleRequest(1, (8, 8), 1)], 0)[0],
    ]
    assert len({image.tobytes() for image in images}) == 4


@pytest.mark.parametrize(
    ("size", "legal"),
    [
        ((16, 17), r"\[16,16\] and \[16,24\]"),
        ((3, 8), r"\[8,8\]$"),
        ((0, -8), r"\[8,8\]$"),
        ((20, 20), r"\[16,16\] and"),
    ],
)
def test_a_size_that_does_not_divide_names_the_nearest(size: tuple[int, int], legal: str) -> None:
    with pytest.raises(ValueError, match=rf"must be multiples of 8 pixels.*{legal}"):
        check_size(size, 8)


def test_a_wrong_size_stops_before_any_image() -> None:
    finished: list[float] = []
    with pytest.raises(ValueError, match=r"size=\[9,8\]"):
        sampling()(NET, [*REQUESTS, SampleRequest(0, (9, 8), 9)], 0, lambda done, _: finished.append(done))
    assert finished == []


def test_requests_are_numbered_label_by_label_within_a_repetition() -> None:
    requests = make_requests([0, "star"], [(8, 8), (4, 4)], 2, NAMES)
    assert [r.label for r in requests] == [0, 2] * 4
    assert [r.size for r in requests] == [(8, 8)] * 4 + [(4, 4)] * 4
    assert [r.number for r in requests] == list(range(8))


@pytest.mark.parametrize("label", [3, -1, "heart", 1.5])
def test_a_label_that_does_not_exist_lists_the_classes(label: int | str) -> None:
    with pytest.raises(
        ValueError, match=rf"labels: {label} is not one of the 3 classes 0\.\.2 \(circle, square, star\)"
    ):
        label_number(label, NAMES)


TO_ELEVEN = sorted(map(str, range(12)))


@pytest.mark.parametrize(
    ("names", "label", "number"),
    [
        (TO_ELEVEN, 10, 2), (TO_ELEVEN, 2, 4), (TO_ELEVEN, "2", 4),
        (["1", "2", "3"], 1, 0), (["1", "2", "3"], 3, 2), (["007", "021"], 21, 1), (["00", "01"], 1, 1),
        (["-1", "1"], -1, 0), (["10", "apple", "pear"], 10, 0), (["10", "apple", "pear"], 1, 1),
        (["1", "apple", "pear"], 1, 0), (["1", "01"], 1, 0), (["0", "1", "2"], np.int64(2), 2),
        (["a", "b"], np.int64(1), 1),
    ],
)  # fmt: skip
def test_a_number_is_a_name_where_a_class_has_it(names: list[str], label: int | str, number: int) -> None:
    assert label_number(label, names) == number
    assert (
        make_requests(np.array([label]) if isinstance(label, int) else [label], [(8, 8)], 1, names)[0].label == number
    )


@pytest.mark.parametrize(
    ("names", "label", "message"),
    [
        (["1", "2", "3"], 0, r"labels: 0 is not one of the 3 classes \(1, 2, 3\)"),
        (["01", "001"], 1, r"labels: 1 is not one of the 2 classes \(01, 001\)"),
        (["a", "b"], True, r"labels: True is not one of the 2 classes 0\.\.1 \(a, b\)"),
    ],
)
def test_a_number_that_names_no_class_is_not_taken_for_a_place(names: list[str], label: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        label_number(label, names)


def test_there_must_be_something_to_draw() -> None:
    with pytest.raises(ValueError, match="n=0 must be a whole number of at least 1"):
        make_requests([0], [(8, 8)], 0, NAMES)


@pytest.mark.slow
def test_the_public_function_is_not_hidden_by_the_command_of_its_name() -> None:
    code = "import genfound, genfound.training, genfound.evaluation.evaluator; assert callable(genfound.sample)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_an_option_does_not_say_is_filled_in_and_what_it_does_not_have_is_refused() -> None:
    euler = compose.fill_option("sampler", {"name": "euler", "steps": 3})
    assert euler == {**compose.read_option("sampler", "euler"), "steps": 3} and euler["shift"] == 1.0
    assert compose.fill_option("guidance", {"name": "cfg", "scale": 3.0})["interval"] == [0.0, 1.0]
    with pytest.raises(ValueError, match=r"sampler\.eta is not an option of sampler=euler; its options: steps, shift"):
        compose.fill_option("sampler", {"name": "euler", "eta": 1})
    with pytest.raises(ValueError, match="guidance=foo is unknown; choose one of autoguidance, cfg"):
        compose.fill_option("guidance", {"name": "foo"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, r"sampler\.steps=0"),
        ({"steps": 2, "shift": -1}, r"sampler\.shift=-1"),
        ({"interval": [1, 0]}, r"guidance\.interval"),
    ],
)
def test_settings_are_checked_before_anything_is_drawn(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        if "interval" in options:
            replace(sampling(), guidance=guidance_of("cfg", **options)).check(NET)
        else:
            replace(sampling(), sampler=sampler_of("heun", **options)).check(NET)


def test_an_image_that_is_not_finite_is_never_shown() -> None:
    broken = small_nit(channels=3, patch_size=2).eval()
    torch.nn.init.constant_(broken.final_layer.linear.bias, float("inf"))
    with pytest.raises(FloatingPointError, match="an image is not finite"):
        sampling()(broken, REQUESTS[:1], seed=0)


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def run_in(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A precision, and a run of it."""
    folder = tmp_path_factory.mktemp(request.param) / "run"
    return request.param, untrained_run(folder, f"trainer.precision={request.param}", "model.width=64")


def test_precision_is_that_of_the_run_unless_it_is_set(run_in: tuple[str, Path]) -> None:
    own, run = run_in
    loaded = genfound.load(run)
    loaded = replace(loaded, tokenizer=Undecodable(PixelTokenizer.spec, "shows rounding"))
    drawn = {
        wanted: genfound.sample(loaded, [1], (8, 8), batch=1, precision=wanted) for wanted in (None, "fp32", "bf16")
    }
    assert (drawn["fp32"] != drawn["bf16"]).any()
    assert (drawn[None] == drawn[own]).all()
    with pytest.raises(ValueError, match="precision=fp8 is unknown"):
        genfound.sample(loaded, [1], (8, 8), batch=1, precision="fp8")


def test_so_it_is_of_the_command(run_in: tuple[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own, run = run_in
    monkeypatch.setattr("genfound.config.command_line.user_overrides", lambda: [])
    used: list[str] = []
    monkeypatch.setattr(
        Pipeline, "__call__", lambda self, *_: used.append(self.precision) or [np.zeros((8, 8, 3), np.uint8)]
    )
    for wanted in ("null", "fp32", "bf16"):
        arguments = [
            f"from={run}",
            "labels=[1]",
            "size=[8,8]",
            "batch=1",
            f"precision={wanted}",
            f"out={tmp_path}/{wanted}",
        ]
        runpy.run_module("genfound.sample")["_task"](OmegaConf.create(composed(*arguments, name="sample")))
    assert used == [{"fp32": "32-true", "bf16": "bf16-mixed"}[name] for name in (own, "fp32", "bf16")]


def test_released_dit_and_sit_are_drawn_in_float32() -> None:
    for family in ("dit", "sit"):
        config = composed(f"experiment=official/{family}", f"model={family}_tiny")
        sampling = Pipeline.from_config(config, build.objective(config), PixelTokenizer(), torch.device("cpu"), 2)
        assert sampling.precision == "32-true"


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (gaussian(), "another objective: gaussian there, flow here"),
        (linear_flow(path="gvp"), r"another objective\.path: gvp there, linear here"),
        (linear_flow(prediction="noise"), r"another objective\.prediction: noise there, velocity here"),
    ],
)
def test_the_weaker_network_must_predict_the_same(
    other: Objective, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("genfound.sampling.pipeline.load", lambda *_, **__: SimpleNamespace(net=NET, objective=other))
    config = composed("model=nit_tiny", "guidance=autoguidance", "guidance.weights=runs/weak")
    with pytest.raises(ValueError, match=rf"guidance\.weights=runs/weak has {message}"):
        Pipeline.from_config(config, linear_flow(), PixelTokenizer(), torch.device("cpu"), 2)
    monkeypatch.setattr(
        "genfound.sampling.pipeline.load", lambda *_, **__: SimpleNamespace(net=NET, objective=linear_flow())
    )
    assert Pipeline.from_config(config, linear_flow(), PixelTokenizer(), torch.device("cpu"), 2).guide is NET


def test_codes_take_the_place_of_predicted_data_where_a_tokenizer_has_them() -> None:
    config = composed("model=ldm_tiny", "sampler.steps=2", "guidance=none", "sampler.quantize_x0=true", name="train")
    goal, cpu = build.objective(config), torch.device("cpu")
    net = build.net(config, LatentSpec(3, 4), 3).eval()
    with pytest.raises(ValueError, match=r"sampler\.quantize_x0=true needs a tokenizer with a codebook"):
        Pipeline.from_config(config, goal, PixelTokenizer(), cpu, 2).check(net)
    codec = VQF4(weights="random_tiny", precision="fp32", pixels_per_call=2**20)
    requests = make_requests([0, 1], [(32, 16)], 1, ["a", "b", "c"])
    pipeline = Pipeline.from_config(config, goal, codec, cpu, 2)
    rounded = pipeline.latents(net, requests, seed=0)
    plain = replace(pipeline, sampler=pipeline.sampler.configured("ddim", 2, {"spacing": "leading"}))
    assert all((a - b).abs().max() > 0.1 for a, b in zip(rounded, plain.latents(net, requests, seed=0), strict=True))
