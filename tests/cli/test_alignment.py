"""Runs whose network is aligned to a teacher, from the command line."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from genfound.loggers.json_lines import lines_of
from tests.cli.commands import ROOT, TINY, genfound, one_error
from tests.helpers import ALIGNED

SHORT = [*TINY, "trainer.max_steps=4", "name=run"]
DOCS = ROOT / "docs/alignment.md"
DINO = "alignment.teachers.dinov2"
REPA = "alignment=repa alignment.depth=1"

WRONG = {
    f"{REPA} {DINO}.weights=no/where/at/all": (
        f"{DINO}.weights=no/where/at/all is not a folder; give one with config.json and model.safetensors, or a name "
        "on the Hugging Face hub; alignment=none trains without a teacher, which is another system"
    ),
    f"{REPA} {DINO}.weights=org/model": "weights=org/model is neither a folder nor in the cache",
    f"{REPA} {DINO}.weights=random_tiny": "width=768, but DINOv2 has 32, the channels of its features; set it so",
    "alignment=repa_probe alignment.depth=1 alignment.teachers.probe.weights=no.safetensors": (
        "alignment.teachers.probe.weights=no.safetensors is no file; null trains a probe; alignment=none trains without"
    ),
    "alignment.depth=2": "alignment.depth=2 is the number of a block, and model.depth=1",
    "alignment.depth=0": "alignment.depth=0 must be a whole number of at least 1",
    "alignment.weight=0": "alignment.weight=0 must be a finite number above 0",
    "alignment.projector=mpl": "alignment.projector=mpl is unknown; choose one of mlp, linear, conv",
    "alignment.projector=conv alignment.kernel=2": "alignment.kernel=2 must be odd",
    "alignment.normalise=layer": "alignment.normalise=layer is unknown; choose one of none, zscore",
    "alignment.zscore_alpha=-1": "alignment.zscore_alpha=-1 must be a finite number of at least 0",
    "alignment.every=0": "alignment.every=0 must be a whole number of at least 1",
    "alignment.until=0": "alignment.until=0 must be a whole number of at least 1, or null",
    f"{DINO}._target_=pathlib.Path": f"{DINO}._target_=pathlib.Path is no Teacher of genfound.alignment",
    f"{DINO}._target_=genfound.layers.mlp.Mlp": "genfound.layers.mlp.Mlp is no Teacher",
    f"{DINO}=5": "alignment.teachers.dinov2=5 must be a teacher: _target_, width, and what else it needs; or null",
    "alignment.teachers=5": "alignment.teachers=5 must be teachers by their names",
    "alignment.teachers={}": "alignment.teachers={} would change nothing; alignment.teachers.KEY=null takes one of its",
    "alignment.teachers={x:{width:3}}": "unknown key alignment.teachers: it is not an option of alignment=repa; +alig",
    "alignment.teachers.x.width=3": "+alignment.teachers.NAME={_target_:CLASS,width:CHANNELS} adds a teacher",
    "+alignment.teachers.x={width:3}": "alignment.teachers.x has no _target_; set it to the class",
    "+alignment.x=3": "+alignment.x=3 would add the unknown key alignment.x, which nothing reads; drop the +",
    "alignment.pixels=4": "alignment.pixels=4 needs images that can be read at another size, from files",
    "alignment.pixels=0": "alignment.pixels=0 must be a whole number of at least 1, or null",
    f"model=ldm_tiny batch.images=8 {REPA}": "alignment: the blocks of LDM have feature maps, not tokens; choose",
    "alignment=other": "alignment=other is unknown; choose one of irepa, irepa_probe, none, repa",
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_input_ends_in_a_line(wrong: str, tmp_path: Path) -> None:
    own = [] if wrong.startswith("alignment=") else ALIGNED
    result = genfound("train", *SHORT, *own, *wrong.split(), cwd=tmp_path)
    assert WRONG[wrong] in one_error(result)
    assert not list(tmp_path.glob("runs/*/*/checkpoints/*"))


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder with the teacher of docs/alignment.md and its option."""
    text = DOCS.read_text()
    (tmp_path / "mine/alignment").mkdir(parents=True)
    (tmp_path / "colours.py").write_text(text.partition("```python\n")[2].partition("```")[0])
    (tmp_path / "mine/alignment/colours.yaml").write_text(text.partition("```yaml\n")[2].partition("```")[0])
    return tmp_path


def paths(own: Path) -> str:
    """Where Python finds the modules of a folder too."""
    return os.pathsep.join([str(own), *sys.path])


OWN = ["--config-dir", "mine", *SHORT, "alignment=colours", "alignment.depth=1"]


def test_a_teacher_of_ones_own(own: Path) -> None:
    result = genfound("train", *OWN, cwd=own, PYTHONPATH=paths(own))
    assert result.returncode == 0, result.stderr
    assert "block 1 aligned to colours" in result.stdout
    assert "genfound.train --config-dir mine model=nit_tiny alignment=colours" in DOCS.read_text()


def test_a_second_teacher_is_added_on_the_command_line(tmp_path: Path) -> None:
    second = "+alignment.teachers.second={_target_:genfound.alignment.radio.RADIO,weights:random_tiny,width:32}"
    result = genfound("train", *SHORT, *ALIGNED, second, cwd=tmp_path)
    assert result.returncode == 0 and "block 1 aligned to dinov2, second: 2,688 more" in result.stdout, result.stderr
    assert "+alignment.teachers.radio='{_target_:" in DOCS.read_text()
    other = genfound("sample", "from=runs/default/run", second, cwd=tmp_path)
    assert "would add the unknown key alignment.teachers.second, which nothing reads" in one_error(other)


@pytest.mark.parametrize(
    ("written", "instead", "message"),
    [
        (", width: 3", "", "alignment.teachers.colours has no width; set it to the channels of its features"),
        ("width: 3", "width: 5", "colours: features of shape (1, 3, 7, 9) instead of (1, 5, 7, 9)"),
        ("self.width = width", "pass", "alignment.teachers: width=3, but Colours has None"),
    ],
)
def test_a_teacher_of_another_shape_is_named(written: str, instead: str, message: str, own: Path) -> None:
    for file in (own / "colours.py", own / "mine/alignment/colours.yaml"):
        file.write_text(file.read_text().replace(written, instead))
    assert message in one_error(genfound("train", *OWN, cwd=own, PYTHONPATH=paths(own)))


def test_a_backbone_without_blocks_has_none_to_align(own: Path) -> None:
    (own / "mynet.py").write_text(
        "from genfound.backbones.nit import NiT\n\n\nclass Net(NiT):\n    def __init__(self, **options):\n"
        "        super().__init__(**options)\n        self.layers = self.blocks\n        del self.blocks\n"
    )
    result = genfound("train", *OWN, "model._target_=mynet.Net", cwd=own, PYTHONPATH=paths(own))
    assert "alignment: Net has no `blocks`; choose alignment=none" in one_error(result)


def test_stored_latents_have_no_images_for_a_teacher(tmp_path: Path) -> None:
    encoded = genfound("encode", "data=shapes", "data.images=40", "tokenizer=pixel", "out=store", cwd=tmp_path)
    assert encoded.returncode == 0, encoded.stderr
    result = genfound(
        "train", *SHORT, *ALIGNED, "data=latent_store", "data.root=store", "data.flip=false", cwd=tmp_path
    )
    assert "alignment: data.root=store holds no features of teachers; give genfound.encode this" in one_error(result)


def test_a_step_with_stored_features_has_the_loss_of_a_step_with_a_teacher(tmp_path: Path) -> None:
    images = ["data.flip=true", "data.images=400"]
    stored = ["dtype=fp32", "features_dtype=fp32", "patch_size=2", "tokenizer=pixel"]
    encoded = genfound("encode", "data=shapes", *images, *stored, *ALIGNED, "out=store", cwd=tmp_path)
    assert encoded.returncode == 0, encoded.stderr
    fast = [*SHORT, *ALIGNED, "trainer.precision=fp32", "trainer.max_steps=3"]
    for name, data in (("computed", images), ("stored", ["data=latent_store", "data.root=store"])):
        result = genfound("train", *fast, *data, "data.max_tokens=256", f"name={name}", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    lines = {name: lines_of(tmp_path / f"runs/default/{name}/metrics.jsonl") for name in ("computed", "stored")}
    for computed, stored in zip(
        *([line for line in own if "train/loss" in line] for own in lines.values()), strict=True
    ):
        for key in ("train/loss", "train/alignment", "train/grad_norm"):
            assert stored[key] == pytest.approx(computed[key], rel=1e-6), key
        assert computed["perf/teacher_share"] > 0 == stored["perf/teacher_share"]


@pytest.fixture(scope="module")
def aligned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("aligned")
    result = genfound("train", *SHORT, *ALIGNED, "alignment.until=12", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert "block 1 aligned to dinov2: 1,344 more parameters in projectors" in result.stdout
    return folder / "runs/default/run"


def test_the_loss_of_the_alignment_is_logged_until_its_end(aligned: Path) -> None:
    steps = [line for line in lines_of(aligned / "metrics.jsonl") if "train/loss" in line]
    parts = [(line["images_seen"] <= 12, line["train/alignment"]) for line in steps]
    assert {early for early, _ in parts} == {True, False}
    assert all((value > 0) == early for early, value in parts)
    for line in steps:
        assert line["train/loss"] == pytest.approx(line["train/objective"] + line["train/alignment"], rel=1e-5)
        assert 0 <= line["perf/teacher_share"] < 1
        by_time = [value for key, value in line.items() if key.startswith("train/loss_t/")]
        assert min(by_time) <= line["train/objective"] <= max(by_time) + 1e-6
    state = torch.load(next((aligned / "checkpoints").iterdir()), weights_only=True)
    names = {key for key in state["state_dict"] if key.startswith("alignment.")}
    assert names == {f"alignment.projectors.0.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")}
    assert names < state["ema"]["0.995"].keys()


def test_projectors_leave_and_enter_under_official_names(aligned: Path, tmp_path: Path) -> None:
    converted = genfound("convert", f"from={aligned}", "to=nit.safetensors", "format=official", cwd=tmp_path)
    assert converted.returncode == 0, converted.stderr
    official = load_file(tmp_path / "nit.safetensors")
    assert official["projector.0.weight"].shape == (16, 32) and official["projector.4.bias"].shape == (32,)
    began = genfound(
        "train", *SHORT, *ALIGNED, "init_from=nit.safetensors", "optimizer.lr=0", "trainer.max_steps=1", cwd=tmp_path
    )
    assert began.returncode == 0 and "projectors" not in began.stdout.partition("starting from the weights")[2]
    state = torch.load(tmp_path / "runs/default/run/checkpoints/step-00000001.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(state["alignment.projectors.0.4.bias"], official["projector.4.bias"])
    other = genfound(
        "train", *SHORT, *ALIGNED, "alignment.projector=conv", "init_from=nit.safetensors", "name=conv",
        "trainer.max_steps=1", cwd=tmp_path,
    )  # fmt: skip
    assert other.returncode == 0 and "the projectors of the alignment are new" in other.stdout


def test_a_run_keeps_its_projectors(aligned: Path) -> None:
    more = [*ALIGNED, "alignment.until=12", "trainer.max_steps=5", "allow_changes=true"]
    result = genfound("train", *SHORT, *more, "alignment.hidden=8", cwd=aligned.parents[2])
    assert "a run keeps its network: choose another name=..." in one_error(result)


def test_samples_and_evaluation_need_no_teacher(aligned: Path, tmp_path: Path) -> None:
    result = genfound("sample", f"from={aligned}", "n=1", "sampler.steps=1", "out=out", cwd=tmp_path)
    assert result.returncode == 0 and (tmp_path / "out/grid.png").is_file()
