"""Sharded checkpoints of one process: written whole or not at all, read without running code."""

from __future__ import annotations

import copy
import os
import pickle
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from genfound.runtime import checkpoint_io, sharded_values
from genfound.runtime.sharded_save import ShardedSave
from tests.helpers import differences

Save = Callable[..., dict[str, Any]]


@pytest.fixture
def save() -> Iterator[Save]:
    """Writes a sharded checkpoint of a step, from a copy if it is finished otherwise, and returns what it must hold."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))

    def sharded(values: Tensor) -> DTensor:
        return distribute_tensor(values, mesh, [Shard(0)])

    def write(path: Path, step: int, finish: Callable[[ShardedSave], None] = ShardedSave.complete) -> dict[str, Any]:
        weights, moments = torch.randn(6, 4), torch.randn(3, dtype=torch.bfloat16)
        own = {"global_step": step, "optimizer_states": [{"state": {0: {"step": torch.tensor(2.0)}}, "lr": 0.1}]}
        whole = own | {"state_dict": {"net.a": weights}, "ema": [{"0.9": moments}]}
        parts = own | {"state_dict": {"net.a": sharded(weights)}, "ema": [{"0.9": sharded(moments)}]}
        saving = ShardedSave(parts, path, copy=finish is not ShardedSave.complete)
        if finish is not ShardedSave.complete:  # as the steps that follow do
            whole = copy.deepcopy(whole)
            for tensor in (weights, moments, own["optimizer_states"][0]["state"][0]["step"]):
                tensor.zero_()
        finish(saving)
        return whole

    yield write
    distributed.destroy_process_group()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_holds_what_a_file_would(save: Save, tmp_path: Path) -> None:
    path = tmp_path / "new/step.ckpt"
    whole = save(path, 5)
    assert not differences(checkpoint_io.read(path), whole)
    assert names(path.parent) == ["step.ckpt"]
    assert names(path) == [".metadata", "__0_0.distcp", "state.ckpt"]
    plain = torch.load(path / "state.ckpt", weights_only=True)
    assert plain["state_dict"]["net.a"].is_meta and plain["ema"][0]["0.9"].is_meta


def test_tensors_are_read_by_their_names(save: Save, tmp_path: Path) -> None:
    path = tmp_path / "step.ckpt"
    whole = save(path, 5)
    state = checkpoint_io.read(path, parts=["ema[0].0"])
    assert torch.equal(state["ema"][0]["0.9"], whole["ema"][0]["0.9"])
    weights = state["state_dict"]["net.a"]
    assert weights.is_meta and weights.shape == (6, 4)
    value = checkpoint_io.values(path)
    assert torch.equal(value("state_dict.net.a", weights), whole["state_dict"]["net.a"])
    assert value("global_step", 5) == 5


def test_a_checkpoint_takes_the_place_of_another_and_is_removed(save: Save, tmp_path: Path) -> None:
    path = tmp_path / "step.ckpt"
    for step in (1, 2):
        save(path, step)
        assert checkpoint_io.read(path)["global_step"] == step
    checkpoint_io.save({"global_step": 3}, path)
    assert path.is_file() and checkpoint_io.read(path)["global_step"] == 3
    save(path, 4)
    assert checkpoint_io.newest(tmp_path) == path and checkpoint_io.read(path)["global_step"] == 4
    checkpoint_io.remove(path)
    assert names(tmp_path) == []


def test_a_failure_and_a_kill_leave_the_old_checkpoint_alone(
    save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "step.ckpt"
    save(path, 1)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    for where in ("torch.save", "os.fsync", "pathlib.Path.rename"):
        with monkeypatch.context() as context:
            context.setattr(where, full)
            with pytest.raises(OSError, match=r"No space left on device: '.*/step-2\.ckpt'"):
                save(tmp_path / "step-2.ckpt", 2)
        assert names(tmp_path) == ["step.ckpt"] and checkpoint_io.read(path)["global_step"] == 1
    for left in (".partial-step-3.ckpt", ".partial-removed-step-0.ckpt"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "__0_0.distcp").write_bytes(b"half")
    assert checkpoint_io.newest(tmp_path) == path
    save(tmp_path / "step-4.ckpt", 4)
    assert names(tmp_path) == ["step-4.ckpt", "step.ckpt"]


def test_a_copy_is_written_or_given_up(save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "step.ckpt"
    whole = save(path, 5, lambda saving: saving.complete())
    assert not differences(checkpoint_io.read(path), whole) and names(path) == [
        ".metadata",
        "__0_0.distcp",
        "state.ckpt",
    ]
    monkeypatch.setattr("genfound.runtime.sharded_save._Part.write", lambda part: None)  # it is for ever under way
    save(tmp_path / "step-6.ckpt", 6, ShardedSave.give_up)
    assert names(tmp_path) == ["step.ckpt"]


def test_what_torch_says_of_a_full_disk_is_an_error_of_the_system(
    save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file")

    monkeypatch.setattr("genfound.runtime.sharded_save.FileSystemWriter.write_data", full)
    with pytest.raises(OSError, match="PytorchStreamWriter failed") as error:
        save(tmp_path / "step.ckpt", 1)
    assert error.value.filename == str(tmp_path / "step.ckpt") and names(tmp_path) == []


def test_no_thread_waits_for_a_process_that_has_died(
    save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(saving: ShardedSave) -> None:
        def closed(*_: Any) -> None:
            raise RuntimeError("gloo/transport: Connection closed by peer")

        monkeypatch.setattr(distributed, "all_gather_object", closed)
        saving.complete()

    monkeypatch.setattr("genfound.runtime.sharded_save._Part.write", lambda part: None)  # for ever under way
    with pytest.raises(RuntimeError, match="Connection closed"):
        save(tmp_path / "step.ckpt", 1, lost)
    assert names(tmp_path) == []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("checkpoint")]


@pytest.mark.parametrize("name", ["__0_0.distcp", "state.ckpt"])
def test_files_of_several_checkpoints_are_none(name: str, save: Save, tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path / f"step-{step}.ckpt", step)
    (tmp_path / "step-1.ckpt" / name).replace(tmp_path / "step-2.ckpt" / name)
    with pytest.raises(ValueError, match=r"step-2\.ckpt is damaged .* its files are of several checkpoints"):
        checkpoint_io.read(tmp_path / "step-2.ckpt", parts=())


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("owned",)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "it has no .metadata": lambda path: (path / ".metadata").unlink(),
    "it has no state.ckpt": lambda path: (path / "state.ckpt").unlink(),
    "it has no __0_0.distcp": lambda path: (path / "__0_0.distcp").unlink(),
    "__0_0.distcp is cut short": lambda path: os.truncate(path / "__0_0.distcp", 500),
    ".metadata: it names posix.mkdir": lambda path: (path / ".metadata").write_bytes(pickle.dumps(Malicious())),
    ".metadata: pickle data was truncated": lambda path: os.truncate(path / ".metadata", 200),
}


@pytest.mark.parametrize("reason", DAMAGE)
def test_a_damaged_folder_is_one_line(reason: str, save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "step.ckpt"
    save(path, 1)
    DAMAGE[reason](path)
    said = rf"step\.ckpt is damaged or is not a checkpoint of tensors: {re.escape(reason)}"
    for use in (checkpoint_io.read, lambda path: checkpoint_io.newest(path.parent)):
        with pytest.raises(ValueError, match=said) as error:
            use(path)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "owned").exists()


def test_values_that_are_code_or_not_there_are_one_line(
    save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "step.ckpt"
    save(path, 1)
    reader = sharded_values.Values(path)
    with pytest.raises(ValueError, match=r"step\.ckpt is damaged .*Missing key.*other"):
        reader.fill({"other": torch.zeros(1)})
    size = (path / "__0_0.distcp").stat().st_size
    (path / "__0_0.distcp").write_bytes(pickle.dumps(Malicious()).ljust(size, b"\0"))
    with pytest.raises(ValueError, match=r"step\.ckpt is damaged or is not a checkpoint of tensors") as error:
        checkpoint_io.read(path)
    assert "\n" not in str(error.value) and not (tmp_path / "owned").exists()


def test_a_flipped_bit_in_the_values_is_found_or_changes_nothing(save: Save, tmp_path: Path) -> None:
    save(tmp_path / "step-1.ckpt", 1)
    newest, found = tmp_path / "step-2.ckpt", 0
    expected = save(newest, 2)
    values = newest / "__0_0.distcp"
    whole = values.read_bytes()
    for place in range(0, len(whole), 17):
        values.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        checkpoint_io.set_aside_damaged(tmp_path)
        if newest.is_dir():
            assert not differences(checkpoint_io.read(newest), expected), place
        else:
            (tmp_path / "step-2.ckpt.damaged").rename(newest)
            found += 1
    assert found > len(whole) / 17 / 4
