"""`genfound.convert` and official checkpoints, from the command line."""

import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from genfound.checkpoints.official.families import FAMILIES
from tests.checkpoints.test_diffusers import DECODED, broken, folder_of
from tests.checkpoints.test_load import official_state
from tests.cli.commands import TINY, genfound, one_error
from tests.evaluation.runs import untrained_run

HEADS, DIT = "hints.num_heads=2", "hints.family=dit"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("official")
    for family in ("dit", "nit"):
        torch.save(official_state(family), root / f"{family}.pt")
    whole = (root / "dit.pt").read_bytes()
    (root / "cut_dit.pt").write_bytes(whole[: len(whole) // 2])
    torch.save({"conv.weight": torch.zeros(3)}, root / "other.pt")
    whole_folder = folder_of(root, "dit_decoded", *DECODED, native=True)
    for what in ("no weights", "cut", "heads"):
        shutil.copytree(whole_folder, root / what.replace(" ", "_"))
        broken(root / what.replace(" ", "_"), what)
    for name, file in {"full": "notes.txt", "empty_folder": "model_index.json"}.items():
        (root / name).mkdir()
        (root / name / file).write_text("{}")
    return root


@pytest.mark.parametrize("family", ["dit", "nit"])
def test_there_and_back(folder: Path, family: str, tmp_path: Path) -> None:
    hint = [HEADS, DIT] if family == "dit" else []
    first = genfound("convert", f"from={family}.pt", f"to={tmp_path}/out/", *hint, cwd=folder)
    assert first.returncode == 0, first.stderr
    assert f"{tmp_path}/out/{family}.safetensors (genfound)" in first.stdout
    back = genfound("convert", f"from={tmp_path}/out/{family}.safetensors", f"to={tmp_path}/back.pt", cwd=folder)
    assert "back.pt (official)" in back.stdout, back.stderr
    before, after = (torch.load(f, weights_only=True) for f in (folder / f"{family}.pt", tmp_path / "back.pt"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_a_folder_of_diffusers_is_written_sampled_and_started_from(folder: Path, tmp_path: Path) -> None:
    size = ["hints.tokenizer=random_tiny", HEADS, DIT]
    done = genfound("convert", "from=dit.pt", f"to={tmp_path}/dit", "format=diffusers", *size, cwd=folder)
    assert f"{tmp_path}/dit (diffusers)" in done.stdout and "native=false" in done.stdout, done.stderr
    settings = ["sampler=ddim", "sampler.steps=2", "labels=[1]", "size=[32,32]", "batch=2", "out=out"]
    drawn = genfound("sample", "from=dit", *settings, cwd=tmp_path)
    assert drawn.returncode == 0 and (tmp_path / "out/00000_1_32x32.png").is_file(), drawn.stderr
    run = untrained_run(tmp_path / "run", "model=nit_tiny")
    done = genfound("convert", f"from={run}", "to=nit", "format=diffusers", cwd=tmp_path)
    assert "trust_remote_code=True" in done.stdout, done.stderr
    begun = genfound("train", "init_from=nit", "trainer.max_steps=1", "name=x", *TINY, cwd=tmp_path)
    assert "starting from the weights of nit" in begun.stdout, begun.stderr


WRONG = {
    "from=nowhere.pt": "there is no run nowhere.pt",
    "from=cut_dit.pt": "cut_dit.pt is damaged",
    "from=other.pt": f"of none of {', '.join(FAMILIES)}",
    "from=dit.pt": "dit.pt: these weights fit DiT and SiT alike; say hints.family=dit or hints.family=sit",
    f"from=dit.pt {DIT}": "say hints.num_heads=",
    "from=nit.pt to=x.pt format=genfound": "must end in .safetensors",
    "from=nit.pt format=torch": "format=torch is unknown; choose official, genfound or diffusers",
    "from=nit.pt to=x.pt format=diffusers": "to=x.pt must be a folder for format=diffusers",
    "from=nit.pt to=full format=diffusers": "to=full exists; choose another folder, or remove it",
    "from=nit.pt format=diffusers native=maybe": "native=maybe is unknown; choose auto, true or false",
    "from=nit.pt format=diffusers native=true": "native=true: this is no DiT of diffusers; model=nit is none",
    "from=no_weights": "no_weights/transformer has no weights: no diffusion_pytorch_model.safetensors",
    "from=cut": "cut/transformer/diffusion_pytorch_model.safetensors is damaged",
    "from=heads": "heads/transformer/config.json says heads=4, and its weights 2",
    "from=empty_folder": "a folder of diffusers without transformer/config.json",
    "from=nit.pt hints.family=gan": "family=gan is unknown",
    "from=nit.pt to=nit.pt format=official": "is the file itself",
}


@pytest.mark.parametrize("arguments", WRONG)
def test_wrong_input_is_one_line_and_writes_nothing(folder: Path, arguments: str, tmp_path: Path) -> None:
    to = [] if " to=" in arguments else [f"to={tmp_path}/out/"]
    before = sorted(folder.iterdir())
    assert WRONG[arguments] in one_error(genfound("convert", *arguments.split(), *to, cwd=folder))
    assert sorted(folder.iterdir()) == before and not (tmp_path / "out").exists()


def test_latents_without_an_autoencoder_are_no_picture(folder: Path, tmp_path: Path) -> None:
    error = one_error(genfound("sample", "from=dit.pt", HEADS, DIT, "labels=[1]", f"out={tmp_path}/out", cwd=folder))
    assert "tokenizer.weights" in error and not (tmp_path / "out").exists()


def test_the_sampler_of_an_official_checkpoint_is_composed_with_what_is_set(folder: Path) -> None:
    shown = genfound("sample", "--cfg", "job", "from=dit.pt", HEADS, DIT, "guidance.scale=3", cwd=folder)
    assert shown.returncode == 0, shown.stderr
    composed = OmegaConf.create(shown.stdout)
    assert (composed.sampler.name, composed.sampler.steps) == ("ddpm", 250)
    assert (composed.guidance.channels, composed.guidance.scale) == ("first3", 3)


def test_an_official_checkpoint_is_sampled(folder: Path, tmp_path: Path) -> None:
    settings = ["sampler=ddim", "sampler.steps=2", "labels=[1,6]", "size=[32,48]", "batch=2", f"out={tmp_path}/out"]
    result = genfound("sample", "from=dit.pt", HEADS, DIT, "hints.tokenizer=random_tiny", *settings, cwd=folder)
    assert result.returncode == 0, result.stderr
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "00000_1_32x48.png", "00001_6_32x48.png", "grid.png",
    ]  # fmt: skip


def test_fine_tuning_from_a_file_of_another_architecture(folder: Path, tmp_path: Path) -> None:
    small = ["model=dit_tiny", "model.width=32", "model.depth=1", "model.heads=2", f"runs={tmp_path}/runs"]
    error = one_error(genfound("train", *small, f"init_from={folder}/nit.pt", "logger=jsonl", cwd=folder))
    assert "nit.pt does not fit DiT" in error
