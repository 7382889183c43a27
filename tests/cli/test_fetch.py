"""`genfound.fetch` from the command line, with a hub on this machine, and trainings where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from genfound.tokenizers.weights import CONFIG, WEIGHTS
from tests.cli.commands import TINY, genfound, one_error
from tests.hub import hub

NAME = "stabilityai/sd-vae-ft-ema"
NOWHERE = "http://127.0.0.1:9"


class Hub(NamedTuple):
    address: str
    downloads: list[str]


@pytest.fixture
def near(tmp_path: Path) -> Iterator[Hub]:
    with hub(tmp_path / "served") as served:
        yield Hub(*served)


def environment(tmp_path: Path, address: str) -> dict[str, str]:
    return {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": address}


def test_weights_are_fetched_once_and_used_offline(near: Hub, tmp_path: Path) -> None:
    words = ["model=sit_s", "inception=false"]
    first = genfound("fetch", *words, cwd=tmp_path, **environment(tmp_path, near.address))
    assert first.returncode == 0, first.stderr
    assert f"downloading {NAME}" in first.stdout and f"tokenizer sd_vae, {NAME}: {tmp_path}/hf/hub/" in first.stdout
    assert "set HF_HUB_OFFLINE=1 in the environment" in first.stdout
    assert sorted(Path(path).name for path in near.downloads) == [CONFIG, WEIGHTS]
    offline = environment(tmp_path, NOWHERE) | {"HF_HUB_OFFLINE": "1"}
    again = genfound("fetch", *words, "to=weights", cwd=tmp_path, **offline)
    assert again.returncode == 0 and "downloading" not in again.stdout, again.stderr
    kept = tmp_path / "weights/sd-vae-ft-ema"
    assert f"set tokenizer.weights={kept}" in again.stdout
    assert sorted(file.name for file in kept.iterdir()) == [CONFIG, WEIGHTS]
    assert (kept / WEIGHTS).read_bytes() == (tmp_path / "served" / WEIGHTS).read_bytes()


def test_a_damaged_file_of_the_cache_is_fetched_again_once_it_is_removed(near: Hub, tmp_path: Path) -> None:
    words, variables = ["fetch", "model=sit_s", "inception=false"], environment(tmp_path, near.address)
    assert genfound(*words, cwd=tmp_path, **variables).returncode == 0
    [kept] = (tmp_path / "hf").rglob(f"snapshots/*/{WEIGHTS}")
    kept.resolve().write_bytes(b"cut")
    error = one_error(genfound(*words, cwd=tmp_path, **variables))
    assert f"{WEIGHTS} is damaged" in error and f"; remove {kept.resolve()} and download it again" in error
    kept.resolve().unlink()
    again = genfound(*words, cwd=tmp_path, **variables)
    assert again.returncode == 0 and f"downloading {NAME}" in again.stdout, again.stderr


def test_without_internet_it_is_one_line_and_nothing_is_written(tmp_path: Path) -> None:
    wrong = genfound("fetch", "model=sit_s", "to=weights", cwd=tmp_path, **environment(tmp_path, NOWHERE))
    error = one_error(wrong)
    assert f"tokenizer.weights={NAME} is neither a folder nor in the cache" in error and "Connection refused" in error
    assert not (tmp_path / "weights").exists()


WRONG = {
    "model=sit_s tokenizer.wights=x": "unknown key tokenizer.wights",
    "model=nope": "model=nope is unknown; choose one of",
    "tokenizer=vq_f4": "tokenizer.weights is missing; give tokenizer.weights=...",
    "tokenizer=sd_vae tokenizer.weights=a/b/c": "tokenizer.weights=a/b/c is not a folder",
    "inception=3": "inception=3 must be true or false",
    "to=file/weights": "to=file/weights: file is not a folder",
}


@pytest.mark.parametrize("arguments", WRONG)
def test_wrong_input_is_one_line(arguments: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert WRONG[arguments] in one_error(genfound("fetch", *arguments.split(), cwd=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


TRAINING = [
    *(word for word in TINY if not word.startswith(("callbacks.preview", "batch"))), "callbacks.preview=null",
    "tokenizer=sd_vae", "model.patch_size=1", "data.sides=[16,24]", "data.size=16", "trainer.devices=2",
    "batch.packs=2", "trainer.max_steps=1", "name=x",
]  # fmt: skip


@pytest.mark.slow
def test_the_command_downloads_for_all_processes_of_a_training(near: Hub, tmp_path: Path) -> None:
    result = genfound("train", *TRAINING, cwd=tmp_path, **environment(tmp_path, near.address))
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("downloading") == 1
    assert sorted(Path(path).name for path in near.downloads) == [CONFIG, WEIGHTS]


def test_a_training_of_several_processes_without_internet_names_the_way_out_once(tmp_path: Path) -> None:
    result = genfound("train", *TRAINING, cwd=tmp_path, **environment(tmp_path, NOWHERE))
    error = one_error(result)
    assert "Connection refused; put its config.json" in error and "python -m genfound.fetch" in error
    assert error.removeprefix("error: ") in (tmp_path / "runs/default/x/FAILED").read_text()


def test_a_teacher_is_fetched_too(tmp_path: Path) -> None:
    """And used from where it was put, without the hub."""
    width = "alignment.teachers.radio.width=32"
    with hub(tmp_path / "hub") as (address, _):
        words = ["alignment=repa_radio", width, "inception=false", "to=here"]
        result = genfound("fetch", *words, cwd=tmp_path, HF_ENDPOINT=address, HF_HOME=str(tmp_path / "hf"))
    assert result.returncode == 0, result.stderr
    setting = f"alignment.teachers.radio.weights={tmp_path / 'here/RADIO-H'}"
    assert f"set {setting}" in result.stdout
    more = ["alignment=repa_radio", "alignment.depth=1", "alignment.pixels=null", width, setting]
    trained = genfound("train", *TINY, *more, "trainer.max_steps=1", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
