"""`python -m genfound.evaluate`: figures with their protocol, from every kind of input, on several processes."""

import contextlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.cli.commands import TINY, genfound, one_error, variables

DATA = ["data.images=300", "data.holdout=100", "data.sides=[12,16]"]
QUICK = ["extractor=probe", "n=160", "accelerator=cpu", "batch=4", "references=kept"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps."""
    folder = tmp_path_factory.mktemp("evaluated")
    result = genfound("train", *TINY, *DATA, "trainer.max_steps=3", "name=run", cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder / "runs/default/run"


def results(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_a_named_protocol_needs_no_more_than_its_name(run: Path) -> None:
    folder = run.parents[2]
    result = genfound("evaluate", f"from={run}", "protocol=quick", "n=70", "accelerator=cpu", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert "fd_probe" in result.stdout and "protocol quick, but for n" in result.stdout
    stored = results(run / "evaluations")
    assert stored[-1]["protocol"]["size"] == "data" and stored[-1]["protocol"]["drawing"]["labels"] == "data"
    assert not (run / "evaluations/work").exists() and list((folder / "runs/.references").glob("probe-*.safetensors"))


@pytest.mark.slow
def test_two_processes_and_a_killed_one_give_the_images_and_figures_of_one(run: Path, tmp_path: Path) -> None:
    arguments = [f"from={run}", *QUICK, "reference=data", "sizes=[16,16]", "sampler.steps=8"]
    for devices in (1, 2):
        more = [f"out=on_{devices}", f"export=on_{devices}.npz", f"devices={devices}"]
        result = genfound("evaluate", *arguments, *more, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    killed = [*arguments, "out=killed", "export=killed.npz"]
    command = [sys.executable, "-m", "genfound.evaluate", *killed]
    process = subprocess.Popen(command, cwd=tmp_path, env=variables(), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("killed/work/*/images-*.npy")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed/results.jsonl").exists() and not list(tmp_path.glob("killed*.npz"))
    resumed = genfound("evaluate", *killed, cwd=tmp_path)
    assert resumed.returncode == 0 and "of 160 samples are there already" in resumed.stdout, resumed.stderr
    alone = [line["figures"] for line in results(tmp_path / "on_1")]
    for name in ("on_2", "killed"):
        for ours, expected in zip(results(tmp_path / name), alone, strict=True):
            assert ours["figures"] == pytest.approx(expected, rel=1e-9)
        assert (tmp_path / f"{name}.npz").read_bytes() == (tmp_path / "on_1.npz").read_bytes()


@pytest.mark.slow
def test_all_processes_end_with_the_one_that_is_terminated(run: Path, tmp_path: Path) -> None:
    arguments = [f"from={run}", *QUICK, "reference=data", "sizes=[16,16]", "n=20000", "devices=2", "out=out"]
    command = [sys.executable, "-m", "genfound.evaluate", *arguments]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, cwd=tmp_path, env=variables(), **silent)  # type: ignore[call-overload]
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("out/work/*/images-*.npy")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(working(tmp_path)) >= 3
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    assert not working(tmp_path)


def working(folder: Path) -> list[str]:
    """Processes whose working directory is a folder."""
    found = []
    for link in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):
            found += [link.parent.name] if link.readlink() == folder else []
    return found


def test_exported_images_give_the_same_figures_and_compare(run: Path, tmp_path: Path) -> None:
    drawn = genfound("evaluate", f"from={run}", *QUICK, "reference=data", "sizes=[16,16]", "export=x", cwd=tmp_path)
    assert drawn.returncode == 0, drawn.stderr
    reference = next((tmp_path / "kept").glob("*.npz"))
    probe = next((tmp_path / "kept").glob("probe-*"))
    arguments = ["from=x", *QUICK, f"reference={reference}", f"extractor_weights={probe}", f"compare=[{run}]"]
    given = genfound("evaluate", *arguments, cwd=tmp_path)
    assert given.returncode == 0, given.stderr
    measured, drawn_line = results(tmp_path / "x.evaluations")[0], results(run / "evaluations")[-1]
    assert measured["figures"] == pytest.approx(drawn_line["figures"], rel=1e-9)  # summed in the order of the content
    assert measured["protocol"]["drawing"] == drawn_line["protocol"]["drawing"]
    assert given.stdout.splitlines()[-1].endswith("the same")


@pytest.mark.slow
def test_a_store_of_latents_is_a_reference(run: Path, tmp_path: Path) -> None:
    encode = ["tokenizer=pixel", "data=shapes", "dtype=fp32", "patch_size=2", "accelerator=cpu", "out=store"]
    encoded = genfound("encode", *encode, *DATA, cwd=tmp_path)
    assert encoded.returncode == 0, encoded.stderr
    for reference, out in (("store", "a"), ("data", "b")):
        more = [f"reference={reference}", "sizes=[16,16]", f"out={out}"]
        result = genfound("evaluate", f"from={run}", *QUICK, *more, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    of_store, of_data = (results(tmp_path / out)[0] for out in ("a", "b"))
    assert of_store["protocol"]["reference"]["images"] == 300
    assert of_store["protocol"]["reference"]["view"] == "crop of decoded latents"
    assert of_store["figures"] == pytest.approx(
        of_data["figures"], rel=1e-4
    )  # the store has the images in its own order
    other = ["tokenizer=dc_ae", "tokenizer.weights=random_tiny", "data=shapes", "accelerator=cpu", "out=other"]
    encoded = genfound("encode", *other, "data.images=40", "data.sides=[32]", cwd=tmp_path)
    assert encoded.returncode == 0, encoded.stderr
    error = one_error(genfound("evaluate", f"from={run}", *QUICK, "reference=other", "sizes=[16,16]", cwd=tmp_path))
    assert "reference=other holds latents of another tokenizer (" in error


WRONG = {
    "from=nowhere": "there is no run nowhere",
    "reference=nowhere.npz": "there is no file nowhere.npz",
    "extractor=inception": "download weights-inception-2015-12-05-6726825d.pth from https://github.com/toshas/torch",
    "experiment=sit_axes_mini": "experiment=sit_axes_mini is not one of this command; python -m genfound.train exp",
    "experiment=best": "experiment=best is unknown; choose one of evaluate/fit_extrapolation, evaluate/",
    "protocol=adm": "protocol=adm is unknown; choose one of adm_50k",
    "accelerator=mps": "error: accelerator=mps, but this machine has no Apple GPU; set accelerator=cpu",
    "n=ten": "n=ten must be a whole number",
    "sizes=[15,16]": "the nearest legal sizes are [14,16] and [16,16]",
    "refrence=data": "unknown key refrence; did you mean reference",
}


@pytest.mark.parametrize("override", WRONG)
def test_wrong_input_is_one_clear_line(override: str, run: Path, tmp_path: Path) -> None:
    key = override.partition("=")[0]
    usual = [f"from={run}", "reference=data", *QUICK]
    arguments = [override, *(argument for argument in usual if not argument.startswith(f"{key}="))]
    result = genfound("evaluate", *arguments, "out=out", cwd=tmp_path)
    assert WRONG[override] in one_error(result)
    assert not (tmp_path / "out").exists()
