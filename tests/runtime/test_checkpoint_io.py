from __future__ import annotations

import os
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from genfound.runtime import checkpoint_io

STATE = {"global_step": 5, "weights": torch.arange(6.0), "names": ["a", "b"], "nested": {"decay": 0.9, "none": None}}


def files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_round_trip(tmp_path: Path) -> None:
    checkpoint_io.save(STATE, tmp_path / "new/step.ckpt")
    state = checkpoint_io.read(tmp_path / "new/step.ckpt")
    assert torch.equal(state.pop("weights"), STATE["weights"])
    assert state == {key: value for key, value in STATE.items() if key != "weights"}
    assert files(tmp_path / "new") == ["step.ckpt"]


@pytest.mark.parametrize("where", ["torch.save", "os.fsync", "pathlib.Path.replace"])
def test_the_old_file_survives_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    path = tmp_path / "step.ckpt"
    checkpoint_io.save(STATE, path)
    before = path.read_bytes()

    def full(*arguments: Any) -> None:
        if where == "torch.save":
            arguments[1].write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(where, full)
    with pytest.raises(OSError, match=r"No space left on device: '.*step\.ckpt'"):
        checkpoint_io.save({"global_step": 6}, path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert files(tmp_path) == ["step.ckpt"]
    assert checkpoint_io.read(path)["global_step"] == 5


def test_a_disk_that_fills_while_the_archive_is_closed_is_an_error_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def close(*_: Any) -> None:
        try:
            raise OSError(28, "No space left on device")
        finally:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    monkeypatch.setattr("torch.save", close)
    with pytest.raises(OSError, match="No space left"):
        checkpoint_io.save(STATE, tmp_path / "step.ckpt")
    assert not files(tmp_path)


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("owned",)


def damage(path: Path, kind: str) -> None:
    checkpoint_io.save({**STATE, "weights": torch.zeros(10_000)}, path)
    whole = path.read_bytes()
    if kind in ("half", "almost whole", "a few bytes"):
        path.write_bytes(whole[: {"half": len(whole) // 2, "almost whole": -30, "a few bytes": 10}[kind]])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("weights: 1\n" * 50)
    elif kind == "a list":
        torch.save([1, 2], path)
    elif kind == "pickle with code":
        path.write_bytes(pickle.dumps(Malicious()))
    else:
        torch.save({"global_step": 1, "code": Malicious()}, path)


@pytest.mark.parametrize(
    "kind",
    ["half", "almost whole", "a few bytes", "empty", "text", "a list", "pickle with code", "checkpoint with code"],
)
def test_a_damaged_file_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "step.ckpt"
    damage(path, kind)
    with pytest.raises(ValueError, match=r"step\.ckpt is damaged or is not a checkpoint of tensors") as error:
        checkpoint_io.read(path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300
    assert not (tmp_path / "owned").exists()


def test_a_file_that_is_called_safetensors_and_is_none_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_text("hello")
    with pytest.raises(ValueError, match=r"x\.safetensors is damaged or is not a checkpoint of tensors"):
        checkpoint_io.read(path)


def test_a_flipped_bit_is_found_or_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chance, state = random.Random(0), {**STATE, "weights": torch.arange(10.0)}
    for step in (1, 2):
        checkpoint_io.save({**state, "global_step": step}, tmp_path / f"step-{step}.ckpt")
    newest, found = tmp_path / "step-2.ckpt", 0
    whole = newest.read_bytes()
    for place in range(len(whole)):
        newest.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << chance.randrange(8)]) + whole[place + 1 :])
        checkpoint_io.set_aside_damaged(tmp_path)
        if newest.is_file():
            assert torch.equal(checkpoint_io.read(newest)["weights"], state["weights"]), place
        else:
            assert "step-2.ckpt is damaged" in capsys.readouterr().out
            (tmp_path / "step-2.ckpt.damaged").rename(newest)
            found += 1
    assert found > 200


def test_an_older_one_that_cannot_be_read_is_in_no_ones_way(tmp_path: Path) -> None:
    damage(tmp_path / "step-1.ckpt", "half")
    checkpoint_io.save(STATE, tmp_path / "step-2.ckpt")
    checkpoint_io.set_aside_damaged(tmp_path)
    assert checkpoint_io.newest(tmp_path) == tmp_path / "step-2.ckpt"
    assert (tmp_path / "step-1.ckpt.damaged").is_file()


def test_where_no_checkpoint_is_whole_nothing_is_renamed(tmp_path: Path) -> None:
    checkpoint_io.set_aside_damaged(tmp_path / "none")
    damage(tmp_path / "step-1.ckpt", "half")
    damage(tmp_path / "step-2.ckpt", "empty")
    with pytest.raises(ValueError, match=r"step-2.ckpt is damaged .* it is empty; no other checkpoint is whole"):
        checkpoint_io.set_aside_damaged(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"step-1.ckpt", "step-2.ckpt"}


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint .*step\.ckpt"):
        checkpoint_io.read(tmp_path / "step.ckpt")


def test_newest_goes_by_the_step_inside(tmp_path: Path) -> None:
    assert checkpoint_io.newest(tmp_path) is None
    for name, step in (("z", 3), ("a", 20), ("m", 7)):
        checkpoint_io.save({"global_step": step}, tmp_path / f"{name}.ckpt")
    (tmp_path / ".b.ckpt.123").write_bytes(b"half written")
    (tmp_path / "._z.ckpt").write_bytes(b"Mac OS X")
    (tmp_path / "notes.txt").touch()
    assert checkpoint_io.newest(tmp_path) == tmp_path / "a.ckpt"


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def test_fill_copies_every_tensor() -> None:
    net, other = network(), network()
    checkpoint_io.load_strict(net, other.state_dict(), Path("x.ckpt"))
    for key, value in net.state_dict().items():
        assert torch.equal(value, other.state_dict()[key])
        assert value.data_ptr() != other.state_dict()[key].data_ptr()


def test_a_network_without_memory_takes_the_tensors_of_a_file_themselves(tmp_path: Path) -> None:
    checkpoint_io.save({"net": network().state_dict()}, tmp_path / "x.ckpt")
    tensors = checkpoint_io.read(tmp_path / "x.ckpt")["net"]
    tensors["1.weight"] = torch.arange(9, dtype=torch.float64)[1:].view(2, 4)
    tensors["1.bias"] = torch.arange(3.0)[1:]
    with torch.device("meta"):
        net = network().requires_grad_(False)
    checkpoint_io.load_strict(net, tensors, Path("x.ckpt"))
    for key, value in net.state_dict(keep_vars=True).items():
        assert isinstance(value, nn.Parameter) and not value.requires_grad and value.dtype == torch.float32
        assert torch.equal(value, tensors[key].float())
        assert (value.data_ptr() == tensors[key].data_ptr()) == key.startswith("0.")
        assert value.data_ptr() % checkpoint_io.ALIGNED == 0


def test_fill_lists_what_does_not_fit_and_copies_nothing() -> None:
    net = network()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    tensors = {key: value + 1 for key, value in before.items()}
    tensors["2.weight"], tensors["1.weight"] = tensors.pop("0.bias"), torch.zeros(2, 5)
    with pytest.raises(ValueError, match=r"x\.ckpt does not fit Sequential") as error:
        checkpoint_io.load_strict(net, tensors, Path("x.ckpt"))
    message = str(error.value)
    for part in ("1 missing (0.bias)", "1 unexpected (2.weight)", "1 of another shape (1.weight)"):
        assert part in message
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key])


def test_fill_counts_all_and_names_a_few() -> None:
    net = nn.Sequential(*(nn.Linear(1, 1) for _ in range(5)))
    with pytest.raises(ValueError, match=r"10 missing \(0\.bias, 0\.weight, 1\.bias\)$"):
        checkpoint_io.load_strict(net, {}, Path("x.ckpt"))


@pytest.mark.parametrize("zipped", [True, False])
def test_files_of_either_format_of_torch_are_read(tmp_path: Path, zipped: bool) -> None:
    torch.save(STATE, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    assert torch.equal(checkpoint_io.read(tmp_path / "x.pth")["weights"], STATE["weights"])  # type: ignore[arg-type]


def test_an_empty_file_is_called_empty(tmp_path: Path) -> None:
    (tmp_path / "x.pth").touch()
    with pytest.raises(ValueError, match=r"x\.pth is damaged .*: it is empty$"):
        checkpoint_io.read(tmp_path / "x.pth")


def test_fill_names_what_is_no_tensor() -> None:
    with pytest.raises(ValueError, match=r"x\.ckpt holds no state dict: 0\.bias is not a tensor"):
        checkpoint_io.load_strict(network(), {**network().state_dict(), "0.bias": [1.0]}, Path("x.ckpt"))  # type: ignore[dict-item]
