"""`python -m genfound.train` with the sockets of Lightning and Hydra: loggers, callbacks, arguments of the Trainer."""

import csv
import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from genfound.config import compose
from genfound.config.options import MOVED, OTHER_KEYS
from tests.cli.commands import TINY, genfound, one_error
from tests.loggers.test_tensorboard import hparams, scalars
from tests.loggers.test_wandb import records, rows

QUIET = [option for option in TINY if not option.startswith("logger=")]
EVERY_STEP = ["callbacks.preview.every=1", "callbacks.validation.every=1"]

OWN = {
    "mine/model/mine.yaml": "# @package _global_\ndefaults: [nit_tiny, _self_]\nmodel: {depth: 2}\n",
    "mine/callbacks/lr.yaml": "lr: {_target_: lightning.pytorch.callbacks.LearningRateMonitor}\n",
    "mine/callbacks/count.yaml": "count: {_target_: counting.Count, every: 1}\n",
    "counting.py": "import lightning\n\nclass Count(lightning.Callback):\n    def __init__(self, every):\n"
    "        self.every = every\n\n    def on_train_end(self, trainer, module):\n"
    "        print('counted', trainer.global_step // self.every)\n",
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with options and code of the user's."""
    for name, text in OWN.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.mark.slow
def test_options_callbacks_and_loggers_of_lightning_and_of_the_user(place: Path) -> None:
    own = ["--config-dir", "mine", "model=mine", "callbacks=[default,lr,count]", "logger=[tensorboard,csv]"]
    options = [*own, *(option for option in QUIET if not option.startswith("model.depth")), "name=run"]
    run = place / "runs/default/run"
    for steps in (2, 4):
        result = genfound("train", *options, f"trainer.max_steps={steps}", cwd=place, PYTHONPATH=python_path(place))
        assert result.returncode == 0, result.stderr
        assert f"counted {steps}" in result.stdout
    assert compose.read_yaml(run / "config.yaml")["model"]["depth"] == 2
    with open(run / "csv/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for key in ("train/loss", "lr-AdamW"):
        of_csv = [(int(row["step"]), float(row[key])) for row in rows if row.get(key)]
        assert of_csv == [(line["step"], pytest.approx(line[key])) for line in lines if key in line]
    assert [int(row["step"]) for row in rows if row["train/loss"]] == [1, 2, 3, 4]
    assert [step for step, _ in scalars(run / "tensorboard", "train/loss")] == [1, 2, 3, 4]


def python_path(place: Path) -> str:
    return f"{place}:{Path(compose.config_dir()).parent / 'src'}"


def test_wandb_and_tensorboard_have_what_runs_are_compared_by(tmp_path: Path) -> None:
    options = [*QUIET, "model=nit_tiny", "logger=[wandb,tensorboard]", "trainer.max_steps=2", "name=run"]
    result = genfound("train", *options, *EVERY_STEP, cwd=tmp_path, WANDB_MODE="offline")
    assert result.returncode == 0, result.stderr
    run = tmp_path / "runs/default/run"
    [sent] = [record.run for _, record in records(run) if record.WhichOneof("record_type") == "run"]
    config = {item.key: json.loads(item.value_json) for item in sent.config.update}
    assert list(sent.tags) == ["NiT", "Shapes", "Flow", "nit_tiny", "shapes", "flow"] and sent.job_type == "train"
    assert config["options"]["model"] == "nit_tiny" and config["model"]["width"] == 32
    assert config["provenance"]["torch"] == torch.__version__
    settings = compose.flatten(config)
    assert None not in settings.values() and "budget.images" in settings and "trainer.max_time" not in settings
    assert any(values.get("samples_table._type") == "table-file" for _, _, values in rows(run))
    of_tensorboard, metrics = hparams(run / "tensorboard")
    assert of_tensorboard["options/model"] == "nit_tiny" and of_tensorboard["model/width"] == 32
    assert metrics[0] == "val/velocity_mse_ema" and scalars(run / "tensorboard", metrics[0])


def test_the_profiler_of_lightning_reports(tmp_path: Path) -> None:
    result = genfound("train", *TINY, "trainer.profiler=simple", "trainer.max_steps=1", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "FIT Profiler Report" in result.stdout + result.stderr and "training_step" in result.stdout + result.stderr


def test_fast_dev_run_touches_no_run_and_calls_every_callback(tmp_path: Path) -> None:
    result = genfound("train", *TINY, "trainer.fast_dev_run=true", "logger=csv", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "step 1 " in result.stdout and "step 2 " not in result.stdout and "samples: " in result.stdout
    assert "nothing of it was kept" in result.stdout and not list(tmp_path.iterdir())
    assert "everything is in" not in result.stdout


def test_loggers_know_the_option_of_each_group_chosen_or_not(tmp_path: Path) -> None:
    result = genfound(
        "train", *TINY, "trainer.max_steps=1", "logger=[csv,tensorboard]", "objective=flow_nit", "name=x", cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    [table] = (tmp_path / "runs/default/x").rglob("metrics.csv")
    options = OmegaConf.load(table.with_name("hparams.yaml")).options
    assert (options.objective, options.model, options.data) == ("flow_nit", "nit_tiny", "shapes")
    assert options.logger == "[csv,tensorboard]"
    assert {"tokenizer", "layout", "sampler", "guidance", "optimizer", "callbacks", "trainer"} <= set(options)


REFUSED = {
    "trainer.log_every=5": "trainer.log_every has moved; set trainer.log_every_n_steps",
    "logger.project=mine": "logger.project has moved; set logger.wandb.project",
    "data.source=store": "data.source has moved; set data=latent_store, nit_latents or lightningdit_latents",
    "model.hidden_size=64": "unknown key model.hidden_size; set model.width",
    "lr=0.1": "unknown key lr; set optimizer.lr",
    "experiment=guidance_interval": "python -m genfound.evaluate experiment=evaluate/guidance_interval",
    "launcher=local": "launcher has moved; set Hydra's group, hydra/launcher=",
    "trainer.max_epochs=3": "trainer.max_epochs cannot be set: set budget.images or trainer.max_steps",
    "trainer.fast_dev_run=3": "trainer.fast_dev_run=3 must be true or false",
    "compile=perhaps": "compile=perhaps must be auto, true or false",
    "trainer.num_nodes=null": "trainer.num_nodes=null must be a whole number of at least 1",
    "strategy=deepspeed": "strategy=deepspeed is unknown; choose one of auto, ddp, fsdp",
    "strategy.save_distributed_checkpoint=true": "strategy.save_distributed_checkpoint",  # of strategy=fsdp alone
    "strategy=fsdp strategy.reduce_dtype=fp16": "strategy.reduce_dtype=fp16 must be bf16 or null",
    "strategy=fsdp strategy.expert_parallel=2": "expert_parallel=2 divides experts, and this model has none; set",
    "strategy=fsdp strategy.expert_parallel=0": "strategy.expert_parallel=0 must be a whole number of at least 1",
    "model=dit_moe_tiny trainer.devices=4 strategy=fsdp strategy.expert_parallel=3": "choose one of 1, 2, 4",
    "model=dit_moe_tiny strategy=fsdp strategy.expert_parallel=2": "num_nodes, 1, and model.experts=8",
    "strategy.expert_parallel=2": "unknown key strategy.expert_parallel; strategy=fsdp has it",
    "logger=[csv,mlflow]": "logger=mlflow is unknown",
    "callbacks.ema=null": "callbacks.ema is part of every run",
    "+callbacks.x._target_=lightning.Nope": "callbacks.x cannot be built: module 'lightning' has no attribute 'Nope'",
    "trainer.profiler=complete": "trainer.profiler=complete is unknown; choose simple, advanced, pytorch or null",
    "trainer.max_time=soon": "trainer.max_time=soon must be days:hours:minutes:seconds",
    "trainer.benchmark=foo": "trainer: set_benchmark_cudnn expects a bool",
    "seed=null": "seed=null must be a whole number of at least 0",
}


@pytest.mark.parametrize("override", REFUSED)
def test_what_is_not_for_the_trainer_is_one_clear_line(override: str, tmp_path: Path) -> None:
    result = genfound("train", *TINY, "trainer.max_steps=1", *override.split(), cwd=tmp_path)
    assert REFUSED[override] in one_error(result)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_every_key_has_its_place() -> None:
    composed = [compose.compose("train", chosen) for chosen in (["optimizer=adamw_jit"], ["logger=wandb"], [])]
    known = {key: value for config in composed for key, value in compose.flatten(config).items()}
    assert not MOVED.keys() & known.keys()
    for old, new in MOVED.items():
        assert new.partition(" ")[0].rstrip(",") in {*known, "the", "Hydra's", "data=latent_store"}, old
    assert all(known[f"trainer.{key}"] is None for key in OTHER_KEYS)
