"""`python -m genfound.sample`: pictures from a run, and wrong input."""

import functools
import shutil
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from genfound.config import compose
from genfound.runtime import run_directory
from tests.cli.commands import TINY, genfound, one_error


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps."""
    folder = tmp_path_factory.mktemp("sampled")
    result = genfound("train", *TINY, "trainer.max_steps=3", "name=run", cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder / "runs/default/run"


def pixels(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file))


def test_a_labelled_grid_and_every_image_alone(run: Path, tmp_path: Path) -> None:
    arguments = [f"from={run}", "labels=[diamond,0]", "size=[[16,16],[14,24]]", "n=2", "batch=4", "out=out"]
    result = genfound("sample", *arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert len(names) == 9 and names[0] == "00000_diamond_16x16.png" and names[-1] == "grid.png"
    assert pixels(tmp_path / "out/00004_diamond_14x24.png").shape == (14, 24, 3)


def test_sizes_never_trained_work(run: Path, tmp_path: Path) -> None:
    result = genfound("sample", f"from={run}", "labels=[1]", "size=[36,8]", "batch=1", "out=out", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert pixels(tmp_path / "out/00000_square_36x8.png").shape == (36, 8, 3)


def test_an_image_depends_on_its_own_request_only(run: Path, tmp_path: Path) -> None:
    for labels, out in (("[3]", "one"), ("[3,4,5,6,7]", "five")):
        arguments = [f"from={run}", f"labels={labels}", "size=[16,16]", "batch=4", f"out={out}"]
        assert genfound("sample", *arguments, cwd=tmp_path).returncode == 0
    alone, among = (pixels(tmp_path / out / "00000_diamond_16x16.png") for out in ("one", "five"))
    assert np.array_equal(alone, among)


def test_single_keys_are_those_of_the_sampler_of_the_run(tmp_path: Path) -> None:
    trained = genfound(
        "train", *TINY, "objective=gaussian_x0", "sampler=ddim", "trainer.max_steps=1", "name=run", cwd=tmp_path
    )
    assert trained.returncode == 0, trained.stderr
    arguments = ["from=runs/default/run", "labels=[1]", "size=[16,16]", "batch=1", "sampler.steps=3"]
    for eta in (0, 1):
        drawn = genfound("sample", *arguments, f"sampler.eta={eta}", f"out=eta{eta}", cwd=tmp_path)
        assert drawn.returncode == 0, drawn.stderr
    images = [pixels(tmp_path / f"eta{eta}/00000_square_16x16.png") for eta in (0, 1)]
    assert not np.array_equal(*images)
    error = one_error(genfound("sample", *arguments, "sampler.shift=2", "out=shift", cwd=tmp_path))
    assert "sampler.shift: it is not an option of sampler=ddim" in error


def test_what_is_composed_is_what_the_run_samples_with(run: Path, tmp_path: Path) -> None:
    shown = genfound("sample", "--cfg", "job", f"from={run}", "guidance.scale=3", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    composed, config = OmegaConf.create(shown.stdout), run_directory.read_config(run)
    assert composed.sampler == config["sampler"]
    assert composed.guidance == {**config["guidance"], "scale": 3}


def test_a_file_names_no_code_by_the_grammar_of_overrides(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    config = run_directory.read_config(run)
    config["guidance"]["power"] = {"_target_:shutil.copytree,src": str(run), "dst": str(tmp_path / "made")}
    OmegaConf.save(config, tmp_path / "run/config.yaml")
    error = one_error(genfound("sample", "from=run", "labels=[1]", "size=[16,16]", cwd=tmp_path))
    assert "run: _target_:shutil.copytree,src is no name of an option" in error
    assert not (tmp_path / "made").exists()


def test_a_sweep_over_models_takes_the_sampler_of_each(run: Path, tmp_path: Path) -> None:
    other = genfound(
        "train", *TINY, "sampler=sde", "sampler.steps=3", "trainer.max_steps=1", "name=other", cwd=tmp_path
    )
    assert other.returncode == 0, other.stderr
    folders = f"from={run},{tmp_path}/runs/default/other"
    swept = genfound(
        "sample", "-m", folders, "labels=[1]", "size=[16,16]", "batch=1", "out=${sampler.name}", cwd=tmp_path
    )
    assert swept.returncode == 0, swept.stderr
    assert (tmp_path / "sde/grid.png").is_file() and (tmp_path / "euler/grid.png").is_file()


def test_a_sweep_of_samples_and_a_folder_with_other_images(run: Path, tmp_path: Path) -> None:
    arguments = [f"from={run}", "labels=[1]", "size=[16,16]", "batch=1", "sampler.steps=1,2"]
    swept = genfound("sample", "-m", *arguments, "out=out-${sampler.steps}", cwd=tmp_path)
    assert swept.returncode == 0, swept.stderr
    assert not (tmp_path / "multirun").exists()
    assert sorted(folder.name for folder in tmp_path.glob("out-*")) == ["out-1", "out-2"]
    again = [f"from={run}", "size=[16,16]", "batch=1", "sampler.steps=1", "out=out-1"]
    assert genfound("sample", *again, "labels=[1]", cwd=tmp_path).returncode == 0
    error = one_error(genfound("sample", *again, "labels=[2]", cwd=tmp_path))
    assert "out=out-1 holds other images (00000_square_16x16.png); choose another out=" in error


def test_shifted_times_may_follow_the_size(run: Path, tmp_path: Path) -> None:
    arguments = [f"from={run}", "labels=[1]", "size=[16,16]", "batch=1", "sampler.steps=2", "sampler.shift=auto"]
    assert genfound("sample", *arguments, "out=out", cwd=tmp_path).returncode == 0


WRONG = {
    "labels=[10]": "labels: 10 is not one of the 10 classes 0..9 (circle, square",
    "accelerator=mps": "error: accelerator=mps, but this machine has no Apple GPU; set accelerator=cpu",
    "labels=[cow]": "labels: cow is not one of the 10 classes",
    "size=[15,16]": "the nearest legal sizes are [14,16] and [16,16]",
    "size=[0,16]": "the nearest legal sizes are [2,16]",
    "size=16": "size=16 must be [height,width]",
    "n=0": "n=0 must be a whole number of at least 1",
    "weights=best": "weights=best is unknown",
    "batch=0": "batch=0 must be a whole number of at least 1",
    "labels=[]": "labels=[]: give at least one class",
    "~guidance.scale": "~guidance.scale would take away a key that is read",
    "sampler.steps=0": "sampler.steps=0 must be a whole number of at least 1",
    "sampler.steps=2.5": "sampler.steps=2.5 must be a whole number",
    "sampler.steps=null": "sampler.steps=None must be a whole number",
    "sampler.shift=wide": "sampler.shift=wide must be a positive number or auto",
    "sampler.eta=1": "unknown key sampler.eta: it is not an option of sampler=euler",
    "sampler.step=3": "did you mean sampler.steps?",
    "guidance.scale=nan": "guidance.scale=nan must be a finite number",
    "guidance.scale=null": "guidance.scale=None must be a number",
    "guidance.interval=[a,b]": "guidance.interval=['a', 'b'] must be a list",
    "guidance.power=-1": "guidance.power=-1 must be a finite number above 0",
    "guidance.channels=two": "guidance.channels=two is unknown",
    "smapler=heun": "unknown key smapler",
    "from=nowhere": "there is no run nowhere",
    "from=.": "is not a run directory",
}


@pytest.mark.parametrize("override", WRONG)
def test_wrong_input_is_one_clear_line(override: str, run: Path, tmp_path: Path) -> None:
    origin = [] if override.startswith("from=") else [f"from={run}"]
    result = genfound("sample", *origin, "out=out", "batch=1", override, cwd=tmp_path)
    assert WRONG[override] in one_error(result)
    assert not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_is_named(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    (copy / "checkpoints").mkdir(parents=True)
    (copy / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    file = next((run / "checkpoints").glob("*.ckpt"))
    (copy / "checkpoints" / file.name).write_bytes(file.read_bytes()[:5000])
    error = one_error(genfound("sample", "from=run", cwd=tmp_path))
    assert "damaged" in error and file.name in error


def test_a_run_with_autoguidance_keeps_its_weaker_network(run: Path, tmp_path: Path) -> None:
    own = ["guidance=autoguidance", f"guidance.weights={run}", "trainer.max_steps=1", "name=strong"]
    trained = genfound("train", *TINY, *own, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    arguments = ["from=runs/default/strong", "labels=[1]", "size=[16,16]", "batch=1", "guidance.scale=3", "out=out"]
    drawn = genfound("sample", *arguments, cwd=tmp_path)
    assert drawn.returncode == 0, drawn.stderr


OWN_SAMPLER = """
from dataclasses import replace
from genfound.samplers import sampler

@sampler(needs="{needs}")
def jump(field, batch, times, rng, progress=None, *, strength=1.0):
    print("jumped", strength)
    t = times[0].item()
    return replace(batch, x=batch.x - strength * t * field.velocity(batch, t))
"""


@pytest.mark.slow
def test_a_sampler_of_the_users_is_a_function_and_an_option(run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine/sampler").mkdir(parents=True)
    for module, needs in (("jumping", "velocity"), ("walking", "gaussian")):
        (tmp_path / f"{module}.py").write_text(OWN_SAMPLER.format(needs=needs))
        option = f"name: {module}\n_target_: {module}.jump\n_partial_: true\nsteps: 1\nstrength: 0.5\n"
        (tmp_path / f"mine/sampler/{module}.yaml").write_text(option)
    paths = f"{tmp_path}:{Path(compose.config_dir()).parent / 'src'}"
    call = functools.partial(genfound, cwd=tmp_path, PYTHONPATH=paths)
    own = ["--config-dir", "mine", "sampler=jumping", "sampler.strength=0.25"]
    arguments = ["labels=[1]", "size=[16,16]", "batch=1"]
    drawn = call("sample", *own, f"from={run}", *arguments, "out=chosen")
    assert drawn.returncode == 0 and "jumped 0.25" in drawn.stdout, drawn.stderr

    tiny = [option for option in TINY if not option.startswith("sampler")]
    trained = call("train", *own, *tiny, "trainer.max_steps=1", "name=run")
    assert trained.returncode == 0, trained.stderr
    error = one_error(call("sample", "from=runs/default/run", *arguments, "out=own"))
    assert "sampler._target_=jumping.jump is code outside genfound; if you trust it, set trust=[jumping]" in error
    drawn = call("sample", "from=runs/default/run", "trust=[jumping]", *arguments, "out=own")
    assert drawn.returncode == 0 and "jumped 0.25" in drawn.stdout, drawn.stderr

    drawn = call("sample", "from=runs/default/run", "trust=[jumping]", *arguments, "sampler.strength=0.5", "out=set")
    assert drawn.returncode == 0 and "jumped 0.5" in drawn.stdout, drawn.stderr

    error = one_error(call("train", "--config-dir", "mine", "sampler=walking", *tiny))
    assert (
        "sampler=walking cannot sample objective=flow; choose sampler=dopri5 or dpm_solver or euler or heun or sde"
        in error
    )
    error = one_error(call("sample", *own, f"from={run}", "sampler.speed=2", *arguments))
    assert "unknown key sampler.speed" in error
