"""What `genfound.plan` says beside published figures and real steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from genfound import build
from genfound.config import compose
from genfound.layouts import Layout
from genfound.reporting.estimate import ACCELERATORS, activations, estimate, saved_bytes
from genfound.tokenizers import PixelTokenizer
from tests.cli.commands import genfound, one_error
from tests.helpers import composed

FAMILIES = [
    "dit_tiny",
    "sit_tiny",
    "fit_tiny",
    "fitv2_tiny",
    "nit_tiny",
    "nit_t2i_tiny",
    "dit_moe_tiny",
    "lightningdit_tiny",
    "jit_tiny",
    "dig_tiny",
    "dim_tiny",
    "ldm_tiny",
]
SMALL = ["model.width=64", "model.depth=3", "model.heads=2"]


def test_the_published_sizes_need_what_was_published(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("genfound.reporting.estimate.activations", lambda *_: (0, 0))
    found = estimate(composed("model=dit_xl", "data=imagenet_256", "trainer.devices=8", resolve=False))
    assert found.parameters == 675_129_632 - 294_912  # learned positions are none of ours
    assert found.gflops(256, 256) == pytest.approx(2 * 118.64, rel=1e-3)
    assert found.gflops(512, 512) == pytest.approx(2 * 524.60, rel=1e-3)
    assert (found.tokens, found.step_images, found.ranks) == (256, 256, 8)
    hours = 3 * 1_792_000_000 * found.gflops(256, 256) * 1e9 / (312e12 * 0.4) / 3600
    assert found.hours(ACCELERATORS["A100 SXM"]) == pytest.approx(hours)
    memory = found.memory
    assert memory.weights == 4 * found.parameters == memory.gradients == memory.averages
    assert memory.moments == 2 * memory.weights


def test_fsdp_divides_what_ddp_holds_on_every_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("genfound.reporting.estimate.activations", lambda *_: (0, 0))
    options = ("model=nit_xl", "data=imagenet_native", "trainer.devices=8")
    ddp, fsdp = (estimate(composed(*options, f"strategy={name}", resolve=False)) for name in ("ddp", "fsdp"))
    assert fsdp.parameters == ddp.parameters and ddp.memory.gathered == 0
    assert fsdp.memory[:4] == tuple(size // 8 for size in ddp.memory[:4])
    assert fsdp.memory.gathered == pytest.approx(4 / 28 * ddp.memory.weights, rel=0.15)  # two of 28 blocks, twice
    assert f"gathered {fsdp.memory.gathered / 1e9:,.2f} GB" in "\n".join(fsdp.lines())
    alone = estimate(composed(*options[:2], "strategy=fsdp", resolve=False))
    assert alone.memory == ddp.memory


def test_shared_experts_are_not_gathered_and_rows_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("genfound.reporting.estimate.activations", lambda *_: (0, 0))
    options = ("model=dit_moe_g_16e2a", "data=imagenet_256", "trainer.devices=8", "strategy=fsdp", "data.batch_size=8")
    found = {
        share: estimate(composed(*options, f"strategy.expert_parallel={share}", *more, resolve=False))
        for share, more in ((1, ()), (4, ()), (8, ()), (2, ("model.activation_checkpointing=2",)))
    }
    stacks = 16 * 3 * 1408 * 5632  # of one of 40 blocks
    for share, whole in ((1, 1), (4, 1 / 4), (8, 0)):  # of a block's experts: two copies for 4 are gathered
        assert found[share].memory[:4] == found[1].memory[:4]
        gathered = found[1].memory.gathered - 16 * stacks * (1 - whole)
        assert found[share].memory.gathered == pytest.approx(gathered)
    steps = 256 / (8 * 8)  # micro-batches of each
    weights, rows = 12 * 40 * stacks * steps, 4 * 40 * 8 * 256 * 2 * 1408 * 2 * steps  # there and back, twice, in bf16
    assert found[1].sent == pytest.approx({1: weights * 7 / 8, 8: rows * 7 / 8})
    assert found[8].sent == found[1].sent
    assert found[4].sent == pytest.approx({1: weights * 7 / 8, 4: weights / 4 / 2 + rows * 3 / 4})
    assert found[2].sent[2] == pytest.approx(weights / 2 * 3 / 4 + rows / 2 * 5 / 4)  # every other block once more
    said = "by strategy.expert_parallel: " + ", ".join(f"{n / 1e9:,.2f} GB with {k}" for k, n in found[8].sent.items())
    assert said in "\n".join(found[8].lines())
    assert not estimate(composed("model=dit_s", *options[1:4], resolve=False)).sent


def test_a_device_keeps_no_rounded_weights_of_experts_that_others_have() -> None:
    options = ["model=dit_moe_tiny", "trainer.precision=bf16"]
    eight, four = (composed(*options, f"model.experts={experts}") for experts in (8, 4))
    half = 4 * 3 * 128 * 128  # experts of a block
    assert activations(eight, 5, 64, half)[0] == pytest.approx(activations(four, 5, 64)[0], rel=0.01)
    exact = composed("model=dit_moe_tiny", "trainer.precision=fp32")
    assert activations(exact, 5, 64, half) == activations(exact, 5, 64)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", FAMILIES)
def test_activations_are_those_of_a_forward_pass(model: str, precision: str) -> None:
    heads = SMALL[-1:] if "heads" in composed(f"model={model}")["model"] else []
    config = composed(f"model={model}", *SMALL[:-1], *heads, f"trainer.precision={precision}")
    net = build.net(config, PixelTokenizer.spec, 1000).train()
    layout: Layout = build.sampling_layout(config)
    images = [torch.randn(3, 16, 16) for _ in range(5)]
    batch = layout.to_batch(images, torch.zeros(5, dtype=torch.int64))
    if net.text_width is not None:
        batch = batch.with_text([torch.randn(net.text_tokens, net.text_width) for _ in images], net.text_tokens)
    real = saved_bytes(net, batch, low=precision == "bf16")
    kept, recomputed = activations(config, images=5, tokens=256 // config["model"]["patch_size"] ** 2)
    assert kept == pytest.approx(real, rel=0.02)
    assert recomputed < 0.8 * kept
    config["model"]["activation_checkpointing"] = True
    both = activations(config, 5, 256 // config["model"]["patch_size"] ** 2)
    assert both == pytest.approx((recomputed, recomputed), rel=0.01)


def test_every_second_block_recomputed_is_between() -> None:
    sizes = {}
    for every in ("false", "2", "true"):
        plan = estimate(composed("model=nit_tiny", f"model.activation_checkpointing={every}", resolve=False))
        sizes[every] = plan.memory.activations
        assert ("with model.activation_checkpointing=true" in "\n".join(plan.lines())) == (every != "true")
    assert sizes["true"] < sizes["2"] < sizes["false"]


def test_a_part_that_is_trained_needs_moments_for_this_part_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("genfound.reporting.estimate.activations", lambda *_: (0, 0))
    tuned = estimate(composed("model=fitv2_hr_xl", "data=imagenet_512", resolve=False))
    assert (tuned.parameters, tuned.trained) == (671_045_776, 94_961_680)
    assert tuned.memory.moments == 8 * tuned.trained and tuned.memory.weights == 4 * tuned.parameters


def test_of_data_that_are_there_tokens_are_counted() -> None:
    found = estimate(composed("model=nit_tiny", "data.sides=[16]", *SMALL))
    assert (found.tokens, found.counted, found.step_images) == (64, True, 8)


def test_the_time_is_that_of_a_short_run_if_there_is_one(tmp_path: Path) -> None:
    found = estimate(composed("model=nit_tiny", *SMALL, "budget.images=7200"))
    assert "nothing yet" in found.measured(tmp_path)[0]
    lines = [{"step": k, "perf/images_per_s": rate} for k, rate in enumerate((1.0, 2.0, 90.0))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "2.0 images/s" in found.measured(tmp_path)[0] and "1.00 hours for the budget" in found.measured(tmp_path)[0]


def test_the_command_needs_no_data(tmp_path: Path) -> None:
    result = genfound("plan", "model=nit_s", "data=imagenet_native", "trainer.devices=8", cwd=tmp_path)
    assert "and 1,476,864 in projectors of the alignment" in result.stdout  # published
    assert result.returncode == 0, result.stderr
    assert "NiT: 32,874,272 parameters" in result.stdout and "by the configuration" in result.stdout
    assert "on 8 devices" in result.stdout and "H100 SXM at 40% of 989 TFLOP/s" in result.stdout
    assert not list(tmp_path.iterdir())


def test_a_sweep_is_summed_up(tmp_path: Path) -> None:
    swept = genfound("plan", "-m", "model=dit_tiny,nit_tiny", cwd=tmp_path)
    assert swept.returncode == 0, swept.stderr
    assert "model-nit_tiny" in swept.stdout and "all 2 jobs: " in swept.stdout


WRONG = {
    "model=dit_s data=imagenet_256 trainer.devices=3": "cannot be shared by trainer.devices=3; set batch.packs",
    "model=dit_q": "model=dit_q is unknown; choose one of dig",
    "model=dit_s data=imagenet_512 tokenizer=dc_ae model.channels=4": "tokenizer is dc_ae (32 channels) but model.chan",
    "trainer.precision=fp8": "trainer.precision=fp8 is unknown; choose one of auto, bf16, fp32",
    "trainer.accelerator=tpu": "trainer.accelerator=tpu is unknown; choose one of auto, cpu, cuda",
    "mfu=0.5": "unknown key mfu",
}


@pytest.mark.parametrize("arguments", WRONG)
def test_wrong_input_is_one_line(arguments: str, tmp_path: Path) -> None:
    assert WRONG[arguments] in one_error(genfound("plan", *arguments.split(), cwd=tmp_path))


def test_the_presets_are_the_options() -> None:
    assert set(FAMILIES) == {name for name in compose.option_names("model") if name.endswith("_tiny")}
