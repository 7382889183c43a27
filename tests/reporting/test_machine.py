"""What `genfound.doctor` finds on machines that lack something."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from huggingface_hub import constants
from torch import Tensor

from genfound.backbones.base import Backbone
from genfound.config import compose
from genfound.config.errors import JobError
from genfound.layers import attention, expert_kernels, gla, ssm
from genfound.reporting import all_reduce, kernels, machine
from genfound.reporting.machine import CHECKS, Finding, examine
from genfound.runtime import launch
from tests.apple_gpu import apple_gpu

Find = Callable[..., dict[str, Finding]]


class Usage(NamedTuple):
    total: int
    used: int
    free: int


@pytest.fixture
def find(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Find:
    """The findings of one check by name."""
    runs = tmp_path / "runs"
    runs.mkdir()

    def found(check: str, *overrides: str) -> dict[str, Finding]:
        monkeypatch.setattr(machine, "CHECKS", {check: CHECKS[check]})
        config = compose.compose("train", [f"runs={runs}", "trainer.precision=fp32", *overrides])
        findings = {finding.what: finding for finding in examine(config)}
        assert not list(runs.iterdir())
        return findings

    return found


def status(finding: Finding) -> tuple[str, str]:
    return finding.status, finding.way_out


@pytest.mark.parametrize(
    ("version", "expected", "told"),
    [
        ("2.13.0+cu130", "ok", "packages as tested"),
        ("2.13.1", "warning", "torch 2.13.1 is not the tested 2.13.0"),
        ("2.5.0", "problem", "torch 2.5.0 is not >=2.11"),
        (None, "problem", "torch is missing"),
    ],
)
def test_versions(version: str | None, expected: str, told: str, find: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    pins = (Path(__file__).parents[2] / "constraints.txt").read_text().splitlines()
    tested = dict(line.split("==") for line in pins if "==" in line)

    def installed(name: str) -> str:
        if name == "torch" and version is not None:
            return version
        if name == "torch" or name not in tested:
            raise machine.metadata.PackageNotFoundError(name)
        return tested[name]

    monkeypatch.setattr(machine.metadata, "version", installed)
    finding = find("versions")["versions"]
    assert finding.status == expected and told in finding.found
    assert ("constraints.txt genfound" in finding.way_out) == (expected != "ok")


def test_devices_that_are_not_there(find: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert find("hardware")["CUDA"][1:3] == ("there is a driver, but torch is built without CUDA", "warning")
    asked = find("hardware", "trainer.accelerator=cuda")["hardware"]
    lack = "trainer.accelerator=cuda, but this machine has no CUDA device"
    assert asked[1:] == (lack, "problem", "set trainer.accelerator=cpu")


def test_a_device_that_others_use(find: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: ((79e9, 40e9)[number], 80e9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    found = find("hardware")
    assert found["cuda:0"][1:3] == ("H100, capability 9.0, 79 of 80 GB free", "ok")
    assert found["cuda:1"].status == "warning" and "nvidia-smi" in found["cuda:1"].way_out


def test_bf16(find: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find("bf16")["bf16"].found.endswith("trainer.precision is fp32 here")
    rates = {torch.bfloat16: 1.0, torch.float32: 4.0}
    monkeypatch.setattr(kernels, "products_per_second", lambda dtype, _: rates[dtype])
    slow = "0.25 times as fast as float32"
    assert find("bf16")["bf16"].status == "ok"  # is not used
    found = find("bf16", "trainer.precision=bf16")["bf16"]
    assert found.found.startswith(slow) and status(found) == ("warning", "trainer.precision=fp32")
    monkeypatch.setattr(kernels, "bf16_error", lambda _: 0.5)
    assert status(find("bf16")["bf16"]) == ("problem", "trainer.precision=fp32")


def test_attention(find: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    right = find("attention")
    assert list(right) == [f"attention {name}" for name in ("flash", "varlen", "loop", "flex")]
    assert right["attention loop"].status == "ok" and "auto takes it" in right["attention loop"].found
    assert right["attention flash"][1:] == ("needs a CUDA device of capability 8.0", "ok", "")
    loop = attention.BACKENDS["loop"]

    def wrong_gradient(q: Tensor, k: Tensor, v: Tensor, *where: Any) -> Tensor:
        return loop(q + 0.1 * (q - q.detach()), k, v, *where)

    monkeypatch.setitem(attention.BACKENDS, "loop", wrong_gradient)
    assert status(find("attention")["attention loop"]) == ("problem", "model.attention=loop")


def test_a_backend_is_compared_with_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that has it; here `flash` is made of `loop`."""
    monkeypatch.setattr(attention, "available_backends", lambda *_: ("flash", "loop"))
    monkeypatch.setitem(attention.BACKENDS, "flash", attention.BACKENDS["loop"])
    cpu = torch.device("cpu")
    assert kernels.attention_error("flash", cpu, torch.float32) == 0
    monkeypatch.setitem(attention.BACKENDS, "flash", lambda q, k, v, *_: v * q.mean() * k.mean())
    assert kernels.attention_error("flash", cpu, torch.float32) > 0.5
    monkeypatch.setitem(attention.BACKENDS, "flash", lambda q, k, v, *_: v * q.mean() * k.mean() / 0)
    assert kernels.attention_error("flash", cpu, torch.float32) == float("inf")


def test_experts(find: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    right = find("grouped matmul")["grouped matmul"]
    assert right.status == "ok" and right.found.endswith("training takes slices")
    grouped = expert_kernels.KERNELS["grouped"]
    monkeypatch.setitem(expert_kernels.KERNELS, "grouped", lambda rows, *rest: grouped(1.01 * rows, *rest))
    assert find("grouped matmul")["grouped matmul"].status == "problem"


def test_recurrences(find: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    right = find("recurrence")
    assert {finding.status for finding in right.values()} == {"ok"}
    assert all(finding.found.endswith("model.recurrence=auto takes chunked") for finding in right.values())
    for layer, name in ((gla, "recurrence of DiG"), (ssm, "recurrence of DiM")):
        chunked = layer.FORMS["chunked"]
        monkeypatch.setitem(layer.FORMS, "chunked", lambda *parts, form=chunked: 1.01 * form(*parts))
        assert find("recurrence")[name].status == "problem"


def test_compiling(find: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Backbone) -> None:
        raise RuntimeError("no\ncompiler")

    assert find("torch.compile", "compile=false")["torch.compile"].found == "switched off by compile=false"
    monkeypatch.setattr(Backbone, "compile_blocks", broken)
    unused = find("torch.compile")["torch.compile"]
    assert unused[1:] == ("RuntimeError: no compiler", "warning", "install gcc, or compile=false")
    assert find("torch.compile", "compile=true")["torch.compile"].status == "problem"
    monkeypatch.setattr(Backbone, "compile_blocks", lambda self: None)
    assert find("torch.compile")["torch.compile"].status == "ok"
    monkeypatch.setattr(Backbone, "compile_blocks", lambda self: self.blocks[0].attn.qkv.weight.data.mul_(1.1))
    assert status(find("torch.compile")["torch.compile"]) == ("problem", "compile=false")


def test_disk(find: Find, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 0, 10**12))
    right = find("runs")
    assert right["runs"].found.startswith(f"{tmp_path}/runs: 1,000 of 1,000 GB free")
    assert right["runs"].status == "ok"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 0, 10**9))
    assert status(find("runs")["runs"]) == ("warning", "runs=... on another disk")


def test_a_folder_that_cannot_be_made(find: Find, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    found = find("runs", f"runs={tmp_path}/file/runs")["runs"]
    assert found[2:] == ("problem", "choose another runs=...") and "file is not a folder" in found.found


def test_shared_memory(find: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(64 * 2**20, 0, 64 * 2**20))
    assert find("/dev/shm")["/dev/shm"][1:3] == ("0.1 GB free", "warning")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2**34, 0, 2**34))
    assert find("/dev/shm")["/dev/shm"].status == "ok"


def test_wandb(find: Find, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert find("/dev/shm")["W&B"].found == "WANDB_MODE=disabled"
    monkeypatch.delenv("WANDB_MODE")
    assert find("/dev/shm")["W&B"].found == "offline: nobody is logged in"
    assert find("/dev/shm", "logger=csv")["W&B"].found == "not used by logger=csv"
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password x\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert find("/dev/shm")["W&B"].found == "logged in"
    (tmp_path / ".netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert find("/dev/shm")["W&B"].found == "logged in"


def test_slurm(find: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert find("/dev/shm")["Slurm"].found == "not in a job"
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_NNODES", "2")
    assert find("/dev/shm", "trainer.num_nodes=2")["Slurm"][1:3] == ("job 7 of 2 nodes", "ok")
    assert status(find("/dev/shm")["Slurm"]) == ("warning", "trainer.num_nodes=2, with one task on each")


def test_weights_that_are_not_here(find: Find, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert find("tokenizer")["tokenizer"] == Finding("tokenizer", "pixel: needs no weights")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    found = find("tokenizer", "model=nit_xl")["tokenizer"]
    assert found.status == "problem" and found.found.endswith("it has not been downloaded")
    assert "python -m genfound.fetch" in found.way_out


def test_processes(find: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    def late(*_: Any, **__: Any) -> None:
        raise JobError("process 1 was ended by signal 14 (SIGALRM); the same command goes on with what is complete")

    assert find("all-reduce")["all-reduce"].found.startswith("one process has nothing to reduce")
    monkeypatch.setattr(launch, "launch", late)
    found = find("all-reduce", "trainer.devices=2", "trainer.accelerator=cpu")["all-reduce"]
    assert found[1:] == ("they have not reached each other in 20 s", "problem", all_reduce.WAY_OUT)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda _: True)
    found = find("all-reduce", "trainer.devices=2")["all-reduce"]
    lack = "trainer.devices=2, but this machine has 1 CUDA device(s)"
    assert found[1:] == (lack, "problem", "set trainer.devices=1")


def test_a_check_that_fails_stops_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> Any:
        raise KeyError("x")

    monkeypatch.setattr(machine, "CHECKS", {"first": broken, "all-reduce": CHECKS["all-reduce"]})
    first, second = examine(compose.compose("train", []))
    assert first == Finding("first", "KeyError: 'x'", "problem") and second.status == "ok"


def test_an_apple_gpu_is_listed_and_its_kernels_are_tried(find: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with apple_gpu():
        found = find("hardware")["mps"]
        assert (found.status, found.found) == ("ok", "Apple's GPU, with up to 8 GB of the memory")
        for check in ("attention", "recurrence"):
            assert {finding.status for finding in find(check).values()} == {"ok"}
        assert "mps" not in find("hardware", "trainer.accelerator=cpu")
