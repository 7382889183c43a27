from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from genfound.config import compose
from genfound.runtime import run_directory


def test_the_configuration_folder_is_whole() -> None:
    folder = Path(compose.config_dir())
    assert folder.is_absolute()
    groups = {path.name for path in folder.iterdir()}
    assert {"train.yaml", "sample.yaml", "model", "data", "objective", "sampler", "guidance", "optimizer"} <= groups


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ([], "default"),
        (["model=nit_s"], "model-nit_s"),
        (["seed=1", "model=nit_s"], "model-nit_s__seed-1"),
        (["model=nit_s", "seed=1"], "model-nit_s__seed-1"),
        (["optimizer.lr=1e-4"], "optimizer.lr-1e-4"),
        (["ema.decays=[0.9,0.99]"], "ema.decays-_0.9_0.99"),
        (["study=a", "name=b", "runs=/x", "trainer.max_steps=5", "logger=jsonl", "strategy=ddp"], "default"),
        (["data.root=/home/me/images", "data.num_workers=4", "tokenizer.weights=w", "data=shapes"], "data-shapes"),
        (["allow_changes=true", "trainer=laptop", "seed=3"], "seed-3"),
    ],
)
def test_run_names(overrides: list[str], name: str) -> None:
    assert run_directory.run_name(overrides) == name


@pytest.mark.parametrize(
    ("overrides", "swept", "name"),
    [
        (["data.root=a", "seed=0"], ["data.root"], "data.root-a__seed-0"),
        (["trainer.precision=bf16", "trainer.devices=2"], ["trainer.precision"], "trainer.precision-bf16"),
        (["trainer=laptop", "logger=jsonl", "study=a"], ["logger", "trainer", "study"], "logger-jsonl__trainer-laptop"),
        (["model=nit_s", "trainer.devices=2"], ["trainer.devices", "model"], "model-nit_s__trainer.devices-2"),
    ],
)
def test_what_a_sweep_varies_is_in_the_name(overrides: list[str], swept: list[str], name: str) -> None:
    assert run_directory.run_name(overrides, swept) == name


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=80), min_size=2, max_size=4, unique=True))
def test_values_that_a_sweep_varies_have_names_of_their_own(values: list[str]) -> None:
    """Also those that read alike as file names, such as a/b and a_b, and very long ones."""
    names = {run_directory.run_name([f"data.root={value}", "seed=1"], ["data.root"]) for value in values}
    assert len(names) == len(values)
    assert all(re.fullmatch(r"[A-Za-z0-9._-]{1,100}", name) for name in names)


def test_a_chosen_name_does_not_make_one_run_of_a_sweep(tmp_path: Path) -> None:
    cfg = OmegaConf.create({"runs": str(tmp_path), "study": "s", "name": "mine"})
    overrides = ["name=mine", "seed=1", "data.root=a"]
    assert run_directory.run_dir(cfg, overrides, ["seed", "data.root"]) == tmp_path / "s/mine__data.root-a__seed-1"
    assert run_directory.run_dir(cfg, overrides, ["name"]) == tmp_path / "s/mine"


def test_long_names_are_hashed_and_stay_distinct() -> None:
    long = [f"model.option_number_{i}=value_{i}" for i in range(10)]
    names = {run_directory.run_name(long), run_directory.run_name([*long[:-1], "model.option_number_9=other"])}
    assert len(names) == 2
    for name in names:
        assert len(name) <= run_directory.LONGEST_NAME
        assert re.fullmatch(r"[A-Za-z0-9._-]+", name)
    assert run_directory.run_name(long) == run_directory.run_name(long[::-1])
    assert run_directory.run_name([*long, "seed=1"], ["seed"]).startswith("seed-1__model.option_number_0-value_0__")


@pytest.mark.parametrize("override", ["a.b='x y/../z'", "a.b={c: 1}", "a.b=ü", "a.b=$(rm)", "+a.b=1"])
def test_names_are_plain_file_names(override: str) -> None:
    assert re.fullmatch(r"[A-Za-z0-9._-]+", run_directory.run_name([override]))


@pytest.mark.parametrize(
    ("key", "identity"),
    [
        ("model.depth", True), ("seed", True), ("data", True), ("data.max_tokens", True), ("runs_elsewhere", True),
        ("tokenizer", True), ("runs", False), ("trainer.max_steps", False), ("trainer", False), ("data.root", False),
        ("data.num_workers", False), ("tokenizer.weights", False), ("logger.wandb.project", False), ("study", False),
        ("callbacks.preview.every", False), ("strategy", False), ("compile", False), ("trainer.overfit_batches", True),
    ],
)  # fmt: skip
def test_what_identifies_a_run(key: str, identity: bool) -> None:
    assert run_directory.is_identity(key) is identity


def config(**changes: Any) -> dict[str, Any]:
    whole: dict[str, Any] = {
        "model": {"depth": 2, "width": 8},
        "data": {"root": "/old", "max_tokens": 64},
        "trainer": {"max_steps": 5},
        "seed": 0,
        **{group: {} for group in ("tokenizer", "layout", "objective", "sampler", "guidance", "optimizer")},
    }
    for key, value in changes.items():
        group, _, leaf = key.partition("__")
        if leaf:
            whole[group] = {**whole[group], leaf: value}
        else:
            whole[group] = value
    return whole


def trained(folder: Path) -> Path:
    run_directory.write_config(folder, config(), False)
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints/step-5.ckpt").touch()
    return folder


def test_a_claimed_folder_keeps_its_configuration(tmp_path: Path) -> None:
    run_directory.write_config(tmp_path / "a/b", config(), False)
    assert run_directory.read_config(tmp_path / "a/b") == {"format": 2} | config()
    assert [p.name for p in (tmp_path / "a/b").iterdir()] == ["config.yaml"]


def test_another_identity_is_refused_once_there_is_a_checkpoint(tmp_path: Path) -> None:
    folder = trained(tmp_path / "run")
    with pytest.raises(ValueError, match=r"model\.depth: 2 in the run, 3 now.*name=.*allow_changes=true"):
        run_directory.write_config(folder, config(model__depth=3), False)
    with pytest.raises(ValueError, match=r"data\.extra: None in the run, 1 now"):
        run_directory.write_config(folder, config(data__extra=1), False)
    assert run_directory.read_config(folder) == {"format": 2} | config()


def test_another_identity_may_be_forced(tmp_path: Path) -> None:
    """It is the run's when it has been found to fit, not before."""
    folder = trained(tmp_path / "run")
    run_directory.write_config(folder, config(model__depth=3), True)
    assert run_directory.read_config(folder) == {"format": 2} | config()
    assert run_directory.claimed(folder) == {"format": 2} | config(model__depth=3)
    run_directory.adopt(folder)
    assert run_directory.read_config(folder) == run_directory.claimed(folder) == {"format": 2} | config(model__depth=3)
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoints", "config.yaml"]


def test_what_is_not_identity_may_change(tmp_path: Path) -> None:
    folder = trained(tmp_path / "run")
    changed = config(trainer__max_steps=9, data__root="/new")
    run_directory.write_config(folder, changed, False)
    assert run_directory.claimed(folder) == {"format": 2} | changed
    run_directory.write_config(folder, config(), False)  # again as it was
    assert run_directory.claimed(folder) == {"format": 2} | config() and not (folder / run_directory.NEXT).exists()


@pytest.mark.parametrize("key", ["trainer.precision", "trainer.deterministic", "compile"])
def test_what_changes_numbers_is_refused_though_it_is_not_in_the_name(tmp_path: Path, key: str) -> None:
    folder = trained(tmp_path / "run")
    changed = config(**{key.replace(".", "__"): "new"})
    with pytest.raises(ValueError, match=rf"{key}: None in the run, new now.*allow_changes=true"):
        run_directory.write_config(folder, changed, False)
    run_directory.write_config(folder, changed, True)
    assert run_directory.run_name([f"{key}=new"]) == "default"


def test_auto_is_compared_when_it_is_known_what_it_means(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run_directory.write_config(folder, config(trainer__precision="auto", compile="auto"), False)
    (folder / "DONE").touch()
    run_directory.refuse_changes(folder, config(trainer__precision="fp32", compile=True), False)


def test_hidden_files_are_no_checkpoints(tmp_path: Path) -> None:
    run_directory.write_config(tmp_path, config(), False)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/._step-5.ckpt").touch()
    run_directory.write_config(tmp_path, config(seed=1), False)
    assert run_directory.read_config(tmp_path) == {"format": 2} | config(seed=1)


def test_a_folder_without_a_checkpoint_is_free(tmp_path: Path) -> None:
    run_directory.write_config(tmp_path, config(), False)
    run_directory.write_config(tmp_path, config(seed=1), False)
    assert run_directory.read_config(tmp_path) == {"format": 2} | config(seed=1)


def test_run_folders(tmp_path: Path) -> None:
    cfg = OmegaConf.create({"runs": str(tmp_path), "study": "s", "name": None})
    assert run_directory.run_dir(cfg, ["seed=1"]) == tmp_path / "s/seed-1"
    cfg.name = "mine"
    assert run_directory.run_dir(cfg, ["seed=1"]) == tmp_path / "s/mine"


@pytest.mark.parametrize(("key", "value"), [("name", "a/b"), ("name", ".."), ("study", "../up"), ("study", "a b")])
def test_names_that_leave_the_folder_are_refused(tmp_path: Path, key: str, value: str) -> None:
    cfg = OmegaConf.create({"runs": str(tmp_path), "study": "s", "name": "n", key: value})
    with pytest.raises(ValueError, match=rf"{key}={re.escape(value)} must consist of"):
        run_directory.run_dir(cfg, [])


def test_reading_something_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"is not a run directory: it has no config\.yaml"):
        run_directory.read_config(tmp_path)
    for text, message in (("a: [", "is damaged"), ("- 1", "is damaged"), ("lr: 1", r"config\.yaml has no model")):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(ValueError, match=message):
            run_directory.read_config(tmp_path)


def test_flatten() -> None:
    assert compose.flatten({"a": {"b": {"c": 1}, "d": [1, {"e": 2}]}, "f": None}) == {
        "a.b.c": 1,
        "a.d": [1, {"e": 2}],
        "f": None,
    }


def test_done_and_failed_exclude_each_other(tmp_path: Path) -> None:
    assert run_directory.finished(tmp_path) is None
    assert run_directory.mark_failed(tmp_path, "Traceback ...")
    assert not run_directory.mark_failed(tmp_path, "of another process")
    assert (tmp_path / "FAILED").read_text() == "Traceback ..."
    run_directory.mark_done(tmp_path, {"images": 5, "loss": None})
    assert run_directory.finished(tmp_path) == {"images": 5, "loss": None}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["DONE"]
    (tmp_path / run_directory.NEXT).touch()
    run_directory.mark_failed(tmp_path, "again")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["FAILED"]


def test_paths_of_a_run_lead_where_they_led(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "home/runs/default/x"
    for name in ("home/images", "home/weights", "home/runs/.index", "home/runs/default/x", "other"):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
    config = {
        "runs": "runs", "study": "default", "data": {"root": "images", "index": "runs/.index"},
        "tokenizer": {"weights": "hub/name"}, "guidance": {"weights": "weights"},
    }  # fmt: skip
    monkeypatch.chdir(tmp_path / "other")
    found = run_directory.located(config, folder)
    assert found["data"] == {"root": f"{tmp_path}/home/images", "index": f"{tmp_path}/home/runs/.index"}
    assert found["tokenizer"] == {"weights": "hub/name"} and found["guidance"] == {
        "weights": f"{tmp_path}/home/weights"
    }
    assert run_directory.located(config, tmp_path / "moved/x") == config
    assert run_directory.located({**config, "runs": str(tmp_path / "home/runs")}, folder) == {
        **config, "runs": str(tmp_path / "home/runs"),
    }  # fmt: skip
    monkeypatch.chdir(tmp_path / "home")
    assert run_directory.located(config, Path("runs/default/x")) == config


def test_a_disk_without_room_for_the_reason_hides_no_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.open", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left")))
    assert run_directory.mark_failed(tmp_path, "Traceback ...")
