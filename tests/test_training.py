from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import genfound
from genfound import build, training
from genfound.callbacks import preview
from genfound.config import compose, environment, options
from genfound.loggers.json_lines import lines_of
from genfound.metrics.extractor import full_precision
from genfound.modules.base import GenerativeModule
from genfound.runtime import devices, run_directory
from genfound.sampling.requests import typical_sizes
from genfound.training import fit
from tests.cli.commands import TINY
from tests.helpers import ALIGNED, composed, run_dir, state_differences

WRONG = {
    "sampler.steps=0": r"sampler\.steps=0 must be a whole number of at least 1",
    "guidance.interval=[0.7,0.2]": r"guidance\.interval=.* low <= high",
    "model.label_drop=0": r"guidance needs a null label: .* guidance=none",
    "layout=dense": "layout=dense does not fit NiT",
    "objective=gaussian_x0 sampler=ddim objective.timesteps=30 sampler.steps=40": "40 steps cannot be chosen from 30",
}


@pytest.mark.parametrize(
    ("sizes", "typical"),
    [
        ([(8, 8)], [(8, 8)]),
        ([(8, 16), (16, 8)], [(16, 8), (8, 16)]),
        ([(8, 8), (16, 8), (8, 16)], [(8, 8), (8, 16), (16, 8)]),
        ([(8, 8)] * 98 + [(4, 16), (16, 4)], [(8, 8)]),
    ],
)
def test_typical_sizes_of_few_images_are_those_there_are(
    sizes: list[tuple[int, int]], typical: list[tuple[int, int]]
) -> None:
    assert typical_sizes(np.array(sizes)) == typical


@pytest.mark.parametrize("overrides", WRONG)
def test_settings_of_previews_are_checked_before_the_first_step(overrides: str, tmp_path: Path) -> None:
    folder = run_dir(tmp_path, *TINY, *overrides.split(), "trainer.max_steps=1", "logger=jsonl")
    with pytest.raises(ValueError, match=WRONG[overrides]):
        fit(folder)
    assert {file.name for file in tmp_path.iterdir()} == {"config.yaml"}


KEPT = ("ema.decays=[0.9,0.99]", "callbacks.checkpointing.every=8")
LATER = [pytest.param(extra, marks=pytest.mark.slow) for extra in KEPT]


@pytest.mark.parametrize(
    "extra", ["batch.packs=2", "optimizer=muon", " ".join([*ALIGNED, "alignment.every=2"]), *LATER]
)
def test_whatever_is_saved_continues_bit_by_bit(extra: str, tmp_path: Path) -> None:
    """Weights, averages, optimizer and the place in the data, also where several micro-batches make a step."""
    for name, ends in (("straight", [7]), ("resumed", [2, 3, 7])):
        for end in ends:
            fit(run_dir(tmp_path / name, *TINY, *extra.split(), f"trainer.max_steps={end}"))
    assert not state_differences(tmp_path / "straight", tmp_path / "resumed")


def test_a_run_without_averages_says_so(tmp_path: Path) -> None:
    fit(run_dir(tmp_path, *TINY, "ema.decays=[]", "trainer.max_steps=1"))
    assert genfound.load(tmp_path, weights="raw").class_names
    with pytest.raises(ValueError, match=r"keeps no average of its weights \(ema\.decays=\[\]\); set weights=raw"):
        genfound.load(tmp_path)


def test_a_run_that_failed_at_its_very_end_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last checkpoint is written when the last picture is."""
    folder = run_dir(
        tmp_path, *TINY, "budget.images=40", "callbacks.checkpointing.every=1", "callbacks.preview.every=1000"
    )
    with monkeypatch.context() as context:
        context.setattr(preview, "save_grid", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
        with pytest.raises(OSError, match="No space left"):
            training.run(folder)
    assert "No space left" in (folder / "FAILED").read_text()
    training.run(folder)
    assert run_directory.finished(folder) and not (folder / "FAILED").exists()
    assert len(list((folder / "samples").glob("*.png"))) == 1


def test_a_run_killed_after_its_last_checkpoint_is_ended(tmp_path: Path) -> None:
    folder = run_dir(tmp_path, *TINY, "trainer.max_steps=2")
    fit(folder)
    done = (folder / "DONE").read_text()
    (folder / "DONE").unlink()
    fit(folder)
    assert (folder / "DONE").read_text() == done


@pytest.mark.parametrize("model", ["nit_tiny", "fitv2_tiny"])
@pytest.mark.parametrize("sides", [[8], [24]])
def test_held_out_images_may_have_other_sizes(
    model: str, sides: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Smaller ones, of which more would fit a pack, and larger ones."""
    source = build.source

    def others(config: Any, spec: Any, split: str) -> Any:
        data = {**config["data"], "sides": sides} if split == "val" else config["data"]
        return source({**config, "data": data}, spec, split)

    monkeypatch.setattr(build, "source", others)
    fit(
        run_dir(
            tmp_path,
            *TINY,
            f"model={model}",
            "data.max_tokens=1024",
            "trainer.max_steps=2",
            "callbacks.validation.every=1",
        )
    )
    assert "val/loss_ema" in (tmp_path / "metrics.jsonl").read_text()


SENSELESS = {
    "callbacks.checkpointing.keep=-1": "callbacks.checkpointing.keep=-1 must be a whole number of at least 1",
    "callbacks.checkpointing.every=null": "callbacks.checkpointing.every=null must be a whole number of at least 1",
    "callbacks.preview.every=0": "callbacks.preview.every=0 must be a whole number of at least 1",
    "trainer.log_every_n_steps=null": "trainer.log_every_n_steps=null must be a whole number",
    "trainer.devices=0": "trainer.devices=0 must be",
    "callbacks.evaluation.every=-5": "callbacks.evaluation.every=-5 must be a whole number of at least 1, or null",
    "sample.batch=0": "sample.batch=0 must be",
    "budget.images=-3": "budget.images=-3 must be",
    "batch.packs=0": "batch.packs=0 must be",
    "ema.decays=[1.5]": "ema.decays=1.5 must be a finite number of at least 0 and at most 1",
    "ema.decays=0.9": "ema.decays=0.9 must be a list, such as [0.9999,0.999]",
    "ema.warmup=3": "ema.warmup=3 must be true, false or null",
    "optimizer.ema_decay=2": "optimizer.ema_decay=2 must be",
    "optimizer.betas=[0.9]": "optimizer.betas=[0.9] must be two numbers, such as [0.9,0.999]",
    "optimizer.betas=[0.9,0.95,0.99]": "optimizer.betas=[0.9, 0.95, 0.99] must be two numbers",
    "optimizer.trainable=bias": "optimizer.trainable=bias must be a list of parts of names, such as [adaLN,bias]",
    "optimizer.trainable=[]": "optimizer.trainable=[] must be a list of parts of names",
    "model.mlp_ratio=-1": "model.mlp_ratio=-1 must be a finite number above 0",
    "optimizer.betas=[0.9,2]": "optimizer.betas=2 must be",
    "model.depth=0": "model.depth=0 must be a whole number of at least 1",
    "batch.packs=null batch.images=4": "batch.images counts nothing in layout=packed; set batch.packs",
    "optimizer=muon optimizer.matrices=blocks": "optimizer.matrices=blocks must be a list of parts of names",
    "optimizer=muon optimizer.matrices=[]": "optimizer.matrices=[] must be a list of parts of names",
    "optimizer=muon optimizer.momentum=1.5": "optimizer.momentum=1.5 must be a finite number of",
    "optimizer=muon optimizer.ns_steps=0": "optimizer.ns_steps=0 must be a whole number of at least 1",
    "optimizer=muon optimizer.ns_steps=100": "optimizer.ns_steps=100 must be a finite number of",
    "optimizer.clip=0": "optimizer.clip=0 must be a finite number above 0",
    "model.label_drop=2": "model.label_drop=2 must be",
    "model.activation_checkpointing=-2": "model.activation_checkpointing=-2 must be a whole number of at least 1",
    "data.num_workers=null": "data.num_workers=null must be",
}


@pytest.mark.parametrize("override", SENSELESS)
def test_numbers_that_make_no_sense_are_refused(override: str) -> None:
    with pytest.raises(ValueError) as error:
        options.check(composed(*TINY, *override.split()))
    assert SENSELESS[override] in str(error.value)


OF_MODELS = {
    "dig_tiny": {
        "mlp_ratio=0": "a finite number above 0", "expand_k=-1": "a finite number above 0", "expand_v=0": "a finite",
        "gate_normalizer=0": "a finite number above 0", "gate_rank=0": "a whole number of at least 1",
    },
    "dim_tiny": {"states=0": "a whole number of at least 1", "expand=0": "a whole number of at least 1"},
    "ldm_tiny": {"context_width=0": "a whole number of at least 1"},
    "dit_moe_tiny": {
        "experts=null": "a whole number of at least 1", "top_k=null": "a whole number of at least 1",
        "shared_experts=-1": "a whole number of at least 0", "balance=-1": "a finite number of at least 0",
    },
    "fitv2_tiny": {
        "adaln_rank=0": "a whole number of at least 1, or null", "rope_theta=0": "a finite number above 0",
        "time_shifting=0": "a finite number above 0",
    },
    "jit_tiny": {"in_context_start=null": "a whole number of at least 0"},
}  # fmt: skip


@pytest.mark.parametrize("model", OF_MODELS)
def test_numbers_of_a_model_that_make_no_sense_are_refused(model: str) -> None:
    for override, what in OF_MODELS[model].items():
        with pytest.raises(ValueError, match=rf"^model\.{override} must be {what}"):
            options.check(composed(f"model={model}", f"model.{override}"))


def test_a_project_that_wandb_refuses_stops_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    fit(run_dir(tmp_path, *TINY, "logger=wandb", "logger.wandb.project=a/b", "trainer.max_steps=1"))
    assert "Weights & Biases has stopped (Invalid project name 'a/b'" in capsys.readouterr().out
    assert run_directory.finished(tmp_path) and "train/loss" in (tmp_path / "metrics.jsonl").read_text()


def test_parameters_that_do_not_exist_cannot_be_trained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"optimizer\.trainable=\['lora'\]: no parameter for it has lora"):
        fit(run_dir(tmp_path, *TINY, "optimizer.trainable=[lora]"))


def test_the_end_of_the_budget_is_validated_and_drawn_once(tmp_path: Path) -> None:
    fit(run_dir(tmp_path, *TINY, "budget.images=60", "callbacks.validation.every=1", "callbacks.preview.every=1000"))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    validated = [line["images_seen"] for line in lines if "val/loss" in line]
    assert validated == sorted(set(validated)) and validated[-1] >= 60
    assert [file.stem for file in (tmp_path / "samples").glob("*.png")] == [f"images-{validated[-1]:09d}"]


@pytest.mark.parametrize("group", ["trainer", "data", "optimizer"])
def test_every_option_makes_sense(group: str) -> None:
    for file in sorted((Path(compose.config_dir()) / group).glob("*.yaml")):
        if "???" not in file.read_text():
            options.check(composed(f"{group}={file.stem}"))


def test_the_first_process_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = iter([ValueError("shard 3 is damaged"), RuntimeError("connection closed by peer")])
    monkeypatch.setattr("genfound.training.fit", lambda *_: (_ for _ in ()).throw(next(reasons)))
    (tmp_path / "launch").mkdir()
    monkeypatch.setenv(environment.LAUNCH, str(tmp_path / "launch"))
    run_dir(tmp_path, *TINY, "trainer.devices=3")
    monkeypatch.setenv(training.CONFIG, run_directory.claimed_hash(tmp_path))
    for rank in ("1", "2"):
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "3"}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit):
            training._worker(tmp_path)
    assert (tmp_path / "launch/reason").read_text() == "shard 3 is damaged"
    assert "shard 3 is damaged" in (tmp_path / "FAILED").read_text()


def test_a_worker_of_another_number_of_processes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "launch").mkdir()
    run_dir(tmp_path, *TINY, "trainer.devices=2", "trainer.num_nodes=2")
    variables = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", environment.LAUNCH: str(tmp_path / "launch")}
    for name, value in {**variables, training.CONFIG: run_directory.claimed_hash(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        training._worker(tmp_path)
    assert "genfound starts itself: give the command" in (tmp_path / "launch/reason").read_text()


REFUSED = {
    "trainer.devices=3 batch.packs=2": "a global step of 2 micro-batches cannot be shared by trainer.devices=3",
    "data=image_folder data.root=nowhere tokenizer=dc_ae tokenizer.weights=none/none": "data.root=nowhere is not a",
    "model.channels=4": "tokenizer is pixel (3 channels) but model.channels is 4",
    "tokenizer=sd_vae tokenizer.weights=none/none model.channels=5": "tokenizer is sd_vae (4 channels) but",
    "layout=dense batch.packs=null batch.images=64": "layout=dense does not fit NiT",
    "sampler=ddpm": "sampler=ddpm cannot sample objective=flow",
    "trainer.precision=fp8": "precision=fp8 is unknown",
}


@pytest.mark.parametrize("overrides", REFUSED)
def test_what_is_known_at_once_is_refused_before_anything_is_read(
    overrides: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "training_tokenizer", lambda _: pytest.fail("weights were looked for"))
    config = composed(*TINY, *overrides.split())
    with pytest.raises((ValueError, OSError)) as error:
        build.build_run(config, config["trainer"]["devices"])
    assert REFUSED[overrides] in str(error.value)


def test_more_devices_than_the_machine_has_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"trainer\.devices=4, but this machine has 2 CUDA device"):
        build.check(composed(*TINY, "batch.packs=4", "trainer.devices=4"), 4)


def test_variables_of_launchers_do_not_make_a_run_one_of_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a program calls `fit` itself, and Lightning looks for a cluster."""
    found = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "NODE_RANK": "1", "SLURM_NTASKS": "4",
             "SLURM_PROCID": "3", "SLURM_JOB_NAME": "job"}  # fmt: skip
    for name, value in found.items():
        monkeypatch.setenv(name, value)
    fit(run_dir(tmp_path, *TINY, "batch.packs=2", "trainer.max_steps=1"))
    assert json.loads((tmp_path / "DONE").read_text())["steps"] == 1


def test_the_time_of_a_run_may_be_limited(tmp_path: Path) -> None:
    fit(run_dir(tmp_path, *TINY, "trainer.max_time=00:00:00:00"))
    assert json.loads((tmp_path / "DONE").read_text())["steps"] <= 1


def test_strategies_have_options(tmp_path: Path) -> None:
    parts = build.build_run(composed(*TINY, "strategy=ddp", "strategy.static_graph=true", "batch.packs=2"), 2)
    strategy = training._strategy(parts)
    assert type(strategy).__name__ == "DDPStrategy" and strategy._ddp_kwargs["static_graph"] is True
    usual = training._strategy(build.build_run(composed(*TINY, "batch.packs=2"), 2))
    assert type(usual).__name__ == "DDPStrategy" and usual._ddp_kwargs["gradient_as_bucket_view"] is True


def test_blocks_are_compiled_where_auto_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [devices.compiled(wanted, place) for wanted in ("auto", True, False) for place in (cpu, cuda)] == [
        False, True, True, True, False, False,
    ]  # fmt: skip


def test_float32_products_take_tf32_beside_bf16_on_cuda_alone() -> None:
    for precision, place, expected in (
        ("bf16-mixed", "cuda", "high"),
        ("32-true", "cuda", "highest"),
        ("bf16-mixed", "cpu", "highest"),
    ):
        with devices.float32_products(precision, torch.device(place)):
            assert torch.get_float32_matmul_precision() == expected
            with full_precision(torch.device("cpu")):  # figures of an evaluation within training
                assert torch.get_float32_matmul_precision() == "highest"
            assert torch.get_float32_matmul_precision() == expected
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("at_last_step", [False, True])
def test_a_run_that_ends_in_its_last_preview_trains_nothing_again(
    at_last_step: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = [*TINY, "budget.images=40", "callbacks.validation.every=20", "callbacks.preview.every=20"]
    runs = {"straight": run_dir(tmp_path / "straight", *few)}
    fit(runs["straight"])
    if at_last_step:  # trainer.max_steps is reached with the budget
        few.append(f"trainer.max_steps={lines_of(runs['straight'] / 'metrics.jsonl')[-1]['step']}")
    runs["cut"] = run_dir(tmp_path / "cut", *few)
    with monkeypatch.context() as patch:
        draw = preview.Preview.on_interval

        def killed_at_the_end(self: preview.Preview, trainer: Any, module: GenerativeModule) -> None:
            if module.images_seen >= module.budget:
                raise SystemExit(1)
            draw(self, trainer, module)

        patch.setattr(preview.Preview, "on_interval", killed_at_the_end)
        with pytest.raises(SystemExit):
            fit(runs["cut"])
    monkeypatch.setattr(GenerativeModule, "training_step", lambda *_: pytest.fail("a step was trained again"))
    fit(runs["cut"])
    found, expected = (
        [{key: v for key, v in line.items() if not key.startswith("perf/")} for line in lines_of(run / "metrics.jsonl")]
        for run in (runs["cut"], runs["straight"])
    )
    assert [line for line in found if len(line) > 2] == [line for line in expected if len(line) > 2]
    pictures = [sorted(file.name for file in (run / "samples").iterdir()) for run in runs.values()]
    assert pictures[0] == pictures[1] and (runs["cut"] / "DONE").is_file()
