"""Checkpoints to which each process adds its part: a run goes on from them with any strategy, and is read by all."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor
from torch import multiprocessing as mp
from torch.distributed.tensor import DTensor

import genfound
from genfound import training
from genfound.evaluation.protocol import read_results
from genfound.runtime import checkpoint_io, receipts, sharded_save
from tests.cli.commands import genfound as command
from tests.distributed.test_devices import curve, free_port
from tests.distributed.test_fsdp import NETS, of_one, prepared, spawn, train_on_two
from tests.helpers import differences, state_differences

SHARDED = ["strategy=fsdp", "strategy.save_distributed_checkpoint=true"]
ASYNCHRONOUS = [*SHARDED, "callbacks.checkpointing.asynchronous=true"]
SAVING = ["callbacks.checkpointing.every=24", "callbacks.checkpointing.keep=2"]
"""Of which more than two are written."""

pytestmark = pytest.mark.slow


def without_gathering(rank: int, ranks: int, port: int, runs: Sequence[Path]) -> None:
    """One process of a group that may gather numbers, and no tensors."""
    full_tensor = DTensor.full_tensor

    def only_numbers(tensor: DTensor, **named: Any) -> Tensor:
        assert tensor.numel() == 1, "a tensor is gathered"
        return full_tensor(tensor, **named)

    DTensor.full_tensor = only_numbers  # type: ignore[method-assign,assignment]
    of_one(rank, ranks, port, runs)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On two processes NiT and a DiT-MoE: `straight` of six steps, `cut` of three, asynchronous ones, and `file`."""
    folder = tmp_path_factory.mktemp("sharded")
    kinds = {"straight": SHARDED, "cut": SHARDED, "asynchronous": ASYNCHRONOUS, "cutasynchronous": ASYNCHRONOUS}
    made = [
        prepared(
            folder / f"{net}_{name}", 2, *NETS[net], *how, *SAVING, f"trainer.max_steps={3 if 'cut' in name else 6}"
        )
        for net in ("nit", "dit_moe")
        for name, how in kinds.items()
    ]
    spawn(without_gathering, 2, free_port(), made)
    train_on_two(prepared(folder / "nit_file", 2, *NETS["nit"], "strategy=fsdp", *SAVING))
    return folder


def going_on(runs: Path, name: str, folder: Path, devices: int, *options: str) -> Path:
    """A copy of a run, which is to reach its sixth step."""
    shutil.copytree(runs / name, folder)
    net = name.rpartition("_")[0]
    return prepared(folder, devices, *NETS[net], *SAVING, *options)


def newest(run: Path) -> Path:
    found = checkpoint_io.newest(run / "checkpoints")
    assert found is not None
    return found


def test_a_folder_holds_the_state_of_a_file_and_old_ones_are_removed(runs: Path) -> None:
    sharded, file = runs / "nit_straight", runs / "nit_file"
    assert newest(sharded).is_dir() and newest(file).is_file()
    parts = {path.name for path in newest(sharded).iterdir()}
    assert parts == {".metadata", "__0_0.distcp", "__1_0.distcp", "state.ckpt"}
    assert not state_differences(sharded, file)
    assert len(list((sharded / "checkpoints").iterdir())) == 2
    noted = [[line for line in receipts.read(run / receipts.FILE) if "checkpoint" in line] for run in (sharded, file)]
    assert noted[0] == noted[1] and len(noted[0]) >= 3


def test_a_run_goes_on_from_a_folder_and_from_a_file_with_the_bits_of_one_that_was_not_cut(
    runs: Path, tmp_path: Path
) -> None:
    filed = going_on(runs, "nit_cut", tmp_path / "filed", 2, "strategy=fsdp")
    back = going_on(runs, "nit_cut", tmp_path / "back", 2, "strategy=fsdp", "trainer.max_steps=4")
    train_on_two(filed, back)
    assert newest(back).is_file()
    again = [going_on(runs, f"{net}_cut", tmp_path / net, 2, *SHARDED) for net in ("nit", "dit_moe")]
    again.append(prepared(back, 2, *NETS["nit"], *SAVING, *SHARDED))
    spawn(without_gathering, 2, free_port(), again)
    for run in (*again, filed):
        straight = runs / ("dit_moe_straight" if run.name == "dit_moe" else "nit_straight")
        assert curve(run) == curve(straight) and len(curve(run)) == 6
        assert not state_differences(run, straight), run.name
    assert all(newest(run).is_dir() for run in again) and newest(filed).is_file()


def test_another_number_of_processes_goes_on_from_a_folder(runs: Path, tmp_path: Path) -> None:
    one, four = (
        [going_on(runs, f"{net}_cut", tmp_path / f"{net}_{devices}", devices, *options) for net in ("nit", "dit_moe")]
        for devices, options in ((1, []), (4, SHARDED))
    )
    spawn(of_one, 4, free_port(), four, processes=4)
    for run in one:
        training.fit(run)
        assert newest(run).is_file()
    for run in (*one, *four):
        straight = runs / f"{run.name[:-2]}_straight"
        for key in ("train/loss", "train/grad_norm"):
            assert curve(run, key) == pytest.approx(curve(straight, key), rel=1e-5)
        assert len(curve(run)) == 6
    assert all(newest(run).is_dir() for run in four)


def test_folders_that_are_written_meanwhile_are_the_same(runs: Path, tmp_path: Path) -> None:
    again = [going_on(runs, f"{net}_cutasynchronous", tmp_path / net, 2, *ASYNCHRONOUS) for net in ("nit", "dit_moe")]
    spawn(without_gathering, 2, free_port(), again)
    for net in ("nit", "dit_moe"):
        straight = runs / f"{net}_straight"
        for run in (runs / f"{net}_asynchronous", tmp_path / net):
            assert not state_differences(run, straight) and newest(run).is_dir()
            kept = [sorted(path.name for path in (of / "checkpoints").iterdir()) for of in (run, straight)]
            assert kept[0] == kept[1] and len(kept[0]) == 2
            noted = [
                [line for line in receipts.read(of / receipts.FILE) if "checkpoint" in line] for of in (run, straight)
            ]
            assert [(line["step"], line["weights"]) for line in noted[0]] == [
                (line["step"], line["weights"]) for line in noted[1]
            ]


def ending(rank: int, port: int, run: Path, ended: int, how: str) -> None:
    """One of two processes, of which one dies, or finds the disk full, as it writes its part of a checkpoint.

    The first one dies when it has written it.
    """
    write = sharded_save._Part.write

    def last_act(part: sharded_save._Part) -> None:
        assert threading.current_thread() is not threading.main_thread()
        if rank == 0:
            write(part)
        if rank == ended:
            raise OSError(28, "No space left on device") if how == "full" else SystemExit(os._exit(9))
        if rank == 1:
            write(part)

    sharded_save._Part.write = last_act  # type: ignore[method-assign]
    of_one(rank, 2, port, [run])


@pytest.mark.parametrize("how", [SHARDED, ASYNCHRONOUS], ids=["waits", "asynchronous"])
def test_a_full_disk_of_one_process_ends_all_and_leaves_nothing(how: list[str], runs: Path, tmp_path: Path) -> None:
    run = going_on(runs, "nit_cut", tmp_path / "run", 2, *how)
    before = newest(run)
    with pytest.raises(mp.ProcessRaisedException, match=r"No space left on device: '.*step-00000004\.ckpt'"):
        mp.spawn(ending, (free_port(), run, 1, "full"), nprocs=2)
    assert newest(run) == before and not list((run / "checkpoints").glob(".partial-*"))


@pytest.mark.parametrize(("ended", "how"), [(0, SHARDED), (1, ASYNCHRONOUS)], ids=["waits", "asynchronous"])
def test_a_kill_while_a_folder_is_written_costs_the_steps_since_the_last(
    ended: int, how: list[str], runs: Path, tmp_path: Path
) -> None:
    run = going_on(runs, "nit_cut", tmp_path / "run", 2, *how)
    before = newest(run)
    with pytest.raises(mp.ProcessExitedException):
        mp.spawn(ending, (free_port(), run, ended, "killed"), nprocs=2)
    assert newest(run) == before
    filed = prepared(Path(shutil.copytree(run, tmp_path / "filed")), 2, *NETS["nit"], *SAVING, "strategy=ddp")
    (run / "checkpoints/.partial-step-00000005.ckpt").write_text("of a killed process that wrote a file")
    train_on_two(run, filed)
    assert not state_differences(run, runs / "nit_straight")
    assert newest(filed).is_file() and curve(filed) == pytest.approx(curve(run), rel=1e-5)
    assert not [*run.glob("checkpoints/.partial-*"), *filed.glob("checkpoints/.partial-*")]


def test_a_part_of_another_run_is_found_and_the_run_goes_back(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = going_on(runs, "nit_cut", tmp_path / "run", 2, *SHARDED)
    before = newest(run).name
    shutil.copy(newest(runs / "nit_straight") / "__1_0.distcp", newest(run))
    checkpoint_io.set_aside_damaged(run / "checkpoints")
    assert f"{before} is damaged" in (said := capsys.readouterr().out) and "of several checkpoints" in said
    assert newest(run).name < before and (run / "checkpoints" / f"{before}.damaged").is_dir()


def test_the_commands_read_a_folder(runs: Path, tmp_path: Path) -> None:
    sharded, file = runs / "nit_straight", runs / "nit_file"
    for weights in ("ema", "raw"):
        nets = [genfound.load(of, weights).net.state_dict() for of in (sharded, newest(sharded), file)]
        assert not differences(nets[0], nets[1]) and not differences(nets[0], nets[2])
    for name, of in (("sharded", sharded), ("one", newest(sharded)), ("file", file)):
        (tmp_path / name).mkdir()
        for each in ("sample n=1 size=[[16,16]] out=x", "convert to=x.safetensors format=genfound"):
            verb, *arguments = each.split()
            result = command(verb, f"from={of}", *arguments, cwd=tmp_path / name)
            assert result.returncode == 0, result.stderr
    pictures = [(tmp_path / name / "x/grid.png").read_bytes() for name in ("sharded", "one", "file")]
    tensors = [load_file(tmp_path / name / "x.safetensors") for name in ("sharded", "one", "file")]
    assert pictures[0] == pictures[1] == pictures[2]
    assert not differences(tensors[0], tensors[1]) and not differences(tensors[0], tensors[2])
    for run in (sharded, file):
        result = command("evaluate", f"from={run}", "protocol=mini", "extractor=probe", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    one, other = (read_results(run)[-1] for run in (sharded, file))
    assert one.figures == other.figures and one.subject["hash"] == other.subject["hash"]
    assert one.subject["checkpoint"] == newest(sharded).name
