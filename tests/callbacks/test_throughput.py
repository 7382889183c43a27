from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from genfound import build
from genfound.callbacks import throughput, train_log
from genfound.callbacks.checkpointing import Checkpointing
from genfound.callbacks.receipt import Receipt
from genfound.callbacks.validation import Validation
from genfound.loggers.json_lines import JsonLines
from genfound.tokenizers import PixelTokenizer
from genfound.training import fit
from tests.cli.commands import TINY
from tests.helpers import composed, latents, run_dir

MODELS = ("dit_tiny", "sit_tiny", "fit_tiny", "fitv2_tiny", "nit_tiny", "dit_moe_tiny")


@pytest.mark.parametrize("model", MODELS)
def test_the_formula_gives_the_operations_of_the_network(model: str) -> None:
    config = composed(f"model={model}")
    spec = build.tokenizer(config).spec
    net = build.net(config, spec, 10)
    side = 8 * config["model"]["patch_size"]
    batch = build.sampling_layout(config).to_batch(latents([(side, side)] * 3, spec.channels), torch.arange(3))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        net(batch, torch.full((3,), 0.5))
    assert net.flops().total(3, 3 * 64, 3 * 64**2) == counter.get_total_flops() > 0


class SlowTokenizer(PixelTokenizer):
    """A tokenizer that the training device runs, and that takes its time."""

    online = True
    seconds = 0.1

    def encode(self, images: Any, noise: Any = None) -> Any:
        time.sleep(self.seconds)
        return super().encode(images, noise)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_clock_has_all_of_a_step_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokenizer's part is in it and is named; validation, previews and saving are not."""
    monkeypatch.setattr(build, "training_tokenizer", lambda _: SlowTokenizer())
    ends: list[tuple[int, float]] = []  # images, and seconds of training
    away = 0.0
    log = JsonLines.log_metrics

    def logged(self: JsonLines, values: Any, step: int) -> None:
        log(self, values, step)
        if "train/loss" in values:
            ends.append((values["images_seen"], time.perf_counter() - away))

    def slowed(work: Any) -> Any:
        def slow(*arguments: Any) -> Any:
            nonlocal away
            begin = time.perf_counter()
            time.sleep(0.3)
            work(*arguments)
            away += time.perf_counter() - begin

        return slow

    monkeypatch.setattr(JsonLines, "log_metrics", logged)
    monkeypatch.setattr(Validation, "on_interval", slowed(Validation.on_interval))
    monkeypatch.setattr(Checkpointing, "_save", slowed(Checkpointing._save))
    monkeypatch.setattr(Receipt, "_note_checkpoint", slowed(Receipt._note_checkpoint))
    options = [
        "trainer.max_steps=9",
        "trainer.log_every_n_steps=3",
        "callbacks.validation.every=8",
        "callbacks.checkpointing.every=8",
    ]
    fit(run_dir(tmp_path, *TINY, *options, "data.sides=[16]", "data.num_workers=0", "callbacks.preview.every=1000"))
    (first, begin), (last, end) = ends[0], ends[-1]
    _, *found = [line for line in lines(tmp_path) if "train/loss" in line]
    clock = (end - begin) / 6
    assert away > 1
    seconds = sum(line["perf/images_per_s"] ** -1 for line in found) / 2 * (last - first) / 6
    assert seconds == pytest.approx(clock, rel=0.1)
    for line in found:
        assert line["perf/encode_share"] == pytest.approx(SlowTokenizer.seconds / clock, rel=0.2)
        assert 0 <= line["perf/data_wait"] < 1 - line["perf/encode_share"]


def test_a_gauge_that_fails_is_left_out_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(_: torch.device) -> float:
        raise torch.OutOfMemoryError("no room for a matrix")

    monkeypatch.setattr(throughput, "matmul_rate", fails)
    fit(run_dir(tmp_path, *TINY, "trainer.max_steps=2"))
    assert capsys.readouterr().out.count("no perf/mfu: OutOfMemoryError: no room for a matrix") == 1
    found = [line for line in lines(tmp_path) if "train/loss" in line]
    assert len(found) == 2
    assert not any("perf/mfu" in line for line in found) and all("perf/images_per_s" in line for line in found)


def test_measuring_the_machine_takes_no_random_number() -> None:
    before = torch.get_rng_state()
    assert train_log.Throughput is throughput.Throughput and throughput.matmul_rate(torch.device("cpu")) > 0
    assert torch.equal(torch.get_rng_state(), before)
