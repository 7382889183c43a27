"""`genfound.audit` through the command line: a run is recomputed, and what was changed in it is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from genfound.modules.base import GenerativeModule
from genfound.runtime import checkpoint_io, receipts
from genfound.training import fit
from tests.cli.commands import TINY, genfound, one_error
from tests.helpers import run_dir

SAME = [*TINY, "data.images=300", "trainer.max_steps=24", "callbacks.checkpointing.every=40", "callbacks.preview=null"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("audit")
    fit(run_dir(folder / "runs/default/run", *SAME))
    return folder / "runs/default/run"


def copied(run: Path, folder: Path) -> Path:
    return Path(shutil.copytree(run, folder / "run"))


def audited(run: Path, *more: str) -> str:
    found = genfound("audit", f"run={run}", *more, cwd=run.parent)
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout.splitlines()[-1]


def test_a_run_is_what_its_receipt_says(run: Path) -> None:
    lines = receipts.read(run / receipts.FILE)
    steps = [line["step"] for line in lines if "loss" in line]
    saved = [line["step"] for line in lines if "checkpoint" in line]
    assert steps == list(range(1, 25)) and saved[-1] == 24 and len(saved) == 3
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = {line["step"]: line["train/grad_norm"] for line in metrics if "train/grad_norm" in line}
    assert logged == {line["step"]: float.fromhex(line["grad_norm"]) for line in lines if "loss" in line}
    assert audited(run) == f"equal: steps {saved[-2] + 1} to 24 are bit by bit those of the receipt"
    assert {path.name for path in run.parent.iterdir()} == {"run"}


def test_a_run_that_was_cut_and_goes_on_has_the_receipt_of_one_that_was_not(run: Path, tmp_path: Path) -> None:
    cut = run_dir(tmp_path / "cut", *SAME, "trainer.max_steps=13")
    fit(cut)
    with open(cut / receipts.FILE, "a") as out:
        out.write('{"step": 14, "images_')  # killed while it wrote
    fit(run_dir(cut, *SAME))
    first, second = ([line for line in receipts.read(own / receipts.FILE) if "loss" in line] for own in (run, cut))
    assert [{**line, "hash": 0} for line in first] == [{**line, "hash": 0} for line in second]
    assert audited(cut, "window=20") == "equal: steps 1 to 24 are bit by bit those of the receipt"


def test_a_byte_of_a_weight_is_found_by_its_name(run: Path, tmp_path: Path) -> None:
    other = copied(run, tmp_path)
    file = other / "checkpoints/step-00000024.ckpt"
    state = dict(checkpoint_io.read(file))
    name = "net.blocks.0.attn.qkv.weight"
    weights = {key: value.clone() for key, value in state["state_dict"].items()}
    weights[name].view(torch.uint8)[3, 1] ^= 1
    checkpoint_io.save({**state, "state_dict": weights}, file)
    error = one_error(genfound("audit", f"run={other}", cwd=tmp_path))
    assert "step-00000024.ckpt has other weights than the receipt says" in error
    assert f"values differ, first state_dict.{name}" in error


def test_a_step_of_another_seed_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = GenerativeModule.training_step

    def wrong_once(module: GenerativeModule, item, batch_idx: int):  # type: ignore[no-untyped-def]
        module.seed = 1 if item[1].step == 17 else 0
        return step(module, item, batch_idx)

    monkeypatch.setattr(GenerativeModule, "training_step", wrong_once)
    fit(run_dir(tmp_path / "run", *SAME))
    error = one_error(genfound("audit", "run=run", "window=20", cwd=tmp_path))
    assert "step 18 is the first that differs: its loss was " in error


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "run=run has no steps in its receipt.jsonl"),
        (b"\x80\x81\n", "receipt.jsonl was changed: line 1 does not follow"),
        (b"[]\n", "receipt.jsonl was changed: line 1 does not follow"),
        (None, "receipt.jsonl ends at step 5, before step-00000024.ckpt: lines are missing"),
    ],
)
def test_a_receipt_that_is_damaged_or_cut_is_one_line(
    content: bytes | None, reason: str, run: Path, tmp_path: Path
) -> None:
    file = copied(run, tmp_path) / receipts.FILE
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:6]) if content is None else content)
    assert reason in one_error(genfound("audit", "run=run", cwd=tmp_path))


def test_wrong_requests_are_one_line(run: Path, tmp_path: Path) -> None:
    other = copied(run, tmp_path)
    config = (other / "config.yaml").read_text()
    assert config.count("strategy: {}") == 1
    foreign = config.replace("strategy: {}", "strategy: {_target_: os.system}")
    for change, arguments, reason in (
        ("", ["run=nothing"], "nothing is not a run directory: it has no config.yaml"),
        ("", ["run=run", "window=0"], "window=0 must be a whole number of at least 1, or null"),
        ("", ["run=run", "widow=3"], "window"),
        (
            foreign,
            ["run=run"],
            "strategy._target_=os.system is no strategy of Lightning",
        ),
        (
            config.replace("seed: 0", "seed: 1"),
            ["run=run"],
            "config.yaml is not the configuration that the receipt tells of",
        ),
    ):
        (other / "config.yaml").write_text(change or config)
        assert reason in one_error(genfound("audit", *arguments, cwd=tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "fsdp strategy.save_distributed_checkpoint=true"])
def test_a_run_of_two_processes_is_recomputed_by_two(strategy: str, tmp_path: Path) -> None:
    two = [*SAME, "batch.packs=2", "trainer.devices=2", *f"strategy={strategy}".split(), "name=two"]
    trained = genfound("train", *two, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert audited(tmp_path / "runs/default/two").startswith("equal: ")
    evaluated = genfound("evaluate", "from=runs/default/two", "protocol=mini", "extractor=probe", cwd=tmp_path)
    assert evaluated.returncode == 0, evaluated.stderr
    head = receipts.head_at(tmp_path / "runs/default/two" / receipts.FILE, "step-00000024.ckpt")
    assert head and f"receipt {head}" in evaluated.stdout
