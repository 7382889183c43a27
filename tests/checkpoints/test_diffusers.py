"""Folders of diffusers: what diffusers alone draws from them, and what is read of them."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor

import genfound
from genfound import build
from genfound.checkpoints import formats
from genfound.checkpoints.convert import Conversion, convert
from genfound.checkpoints.diffusers import read
from genfound.layouts import Dense
from genfound.runtime import checkpoint_io
from genfound.sampling.pipeline import Pipeline, _chosen
from genfound.sampling.requests import make_requests
from tests.evaluation.runs import evaluated, untrained_run
from tests.helpers import composed, latents, randomise

NAMES = [f"c{number}" for number in range(7)]
SMALL = ("model.width=32", "model.depth=2", "model.heads=2")
FAMILIES: dict[str, tuple[str, ...]] = {
    "dit": ("model=dit_tiny",),
    "dit_decoded": ("model=dit_tiny", "tokenizer=sd_vae", "tokenizer.weights=random_tiny", "guidance.channels=first3"),
    "sit": ("model=sit_tiny", "model.unused_half=true"),
    "sit_shifted": ("model=sit_tiny", "sampler=euler", "sampler.shift=3", "objective.noise_scale=1.5"),
    "fit": ("model=fit_tiny",),
    "fitv2": ("model=fitv2_tiny", "model.adaln_rank=8"),
    "nit": ("model=nit_tiny",),
    "nit_official": ("model=nit_tiny", "model.rope_coords=official", "model.adaln_rank=8"),
    "dit_moe": ("model=dit_moe_tiny",),
    "dit_moe_rf": ("model=dit_moe_tiny", "objective=flow", "model.qk_norm=layernorm", "model.unused_half=true"),
    "lightningdit": ("model=lightningdit_tiny",),
    "jit": ("model=jit_tiny",),
    "jit_published": ("model=jit_tiny", "objective.noise_scale=2", "model.in_context_start=1", "guidance=cfg_jit"),
    "dig": ("model=dig_tiny", "layout=dense", "objective=flow"),
    "dig_skip": (
        "model=dig_tiny",
        "objective=flow",
        "model.skip=identity",
        "model.rms_norm=true",
        "model.conv=inside",
    ),
    "cosine": ("model=dit_tiny", "objective.schedule=cosine", "objective.clip_x0=true"),
}
OBLONG = {"dig", "lightningdit", "jit", "jit_published", "fit", "fitv2", "nit", "nit_official"}
SIZE = {"dit_decoded": (64, 64)}


def file_of(folder: Path, name: str, *overrides: str) -> Path:
    """A small model of random weights, in a file of ours."""
    small = SMALL[:2] if "model=dim_tiny" in overrides else SMALL  # which has no heads
    config = composed(*(overrides or FAMILIES[name]), *small)
    net = randomise(build.net(config, build.published_spec(config), len(NAMES)))
    note = {"format": formats.FORMAT, "config": config, "class_names": NAMES, "sizes": [SIZE.get(name, (16, 16))]}
    formats.write(folder / f"{name}.safetensors", net.state_dict(), note)
    return folder / f"{name}.safetensors"


def folder_of(folder: Path, name: str, *overrides: str, native: bool | str = False) -> Path:
    """The same in a folder of diffusers."""
    convert(file_of(folder, name, *overrides), str(folder / name), "diffusers", native=native)
    return folder / name


def ours(file: Path, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Latents, and pictures in [0, 1] before bytes (B, h, w, 3), as `genfound.sample` draws them."""
    loaded = genfound.load(file)
    gaussian, guidance = loaded.objective.name == "gaussian", loaded.config["guidance"]
    shift = loaded.config["sampler"].get("shift", 1.0)
    sampler = {"name": "ddim", "steps": "ddim10"} if gaussian else {"name": "euler", "steps": 10, "shift": shift}
    config = _chosen(loaded.config, sampler, {**guidance, "scale": 2.0, "interval": [0.0, 0.7]}, "fp32")
    pipeline = Pipeline.from_config(config, loaded.objective, loaded.tokenizer, torch.device("cpu"), 2)
    requests = make_requests([1, "c5"], [size], 1, loaded.class_names)
    z = torch.stack(pipeline.latents(loaded.net, requests, seed=3))
    return z, (loaded.tokenizer.decode(z) / 2 + 0.5).clamp(0, 1).movedim(1, -1)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("folders")


def sizes_of(name: str) -> list[tuple[int, int]]:
    return [SIZE.get(name, (16, 16)), *([(12, 20)] if name in OBLONG else [])]


@pytest.fixture(scope="module")
def drawn(root: Path) -> dict[str, Any]:
    """What another process draws from a folder of each family, with diffusers alone."""
    call = {"class_labels": [1, "c5"], "seed": 3, "num_inference_steps": 10, "guidance_scale": 2.0}
    call |= {"guidance_interval": [0.0, 0.7]}
    calls = {}
    for name in FAMILIES:
        folder = folder_of(root, name)
        calls |= {f"{name} {h}x{w}": (str(folder), {**call, "height": h, "width": w}) for h, w in sizes_of(name)}
    calls["again"] = (str(root / "nit"), {"class_labels": [1, 5], "seed": 3})
    (root / "calls.json").write_text(json.dumps(calls))
    client = Path(__file__).with_name("folder_client.py")
    environment = {**os.environ, "HF_MODULES_CACHE": str(root / "modules"), "PYTHONPATH": ""}
    command = [sys.executable, client, "calls.json", "drawn.pt"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = torch.load(root / "drawn.pt")
    return found


def test_files_of_code_of_different_families_have_different_names(root: Path, drawn: dict[str, Any]) -> None:
    """In one process Python may take the compiled file of another folder for theirs, if it is as long and as old."""
    by_name: dict[str, set[str]] = {}
    for file in (*root.glob("*/pipeline*.py"), *root.glob("*/transformer/*.py")):
        by_name.setdefault(file.name, set()).add(file.read_text())
    assert len(by_name) >= 10 and all(len(texts) == 1 for texts in by_name.values())


@pytest.mark.parametrize("name", FAMILIES)
def test_the_same_seed_gives_the_same_picture(name: str, root: Path, drawn: dict[str, Any]) -> None:
    for height, width in sizes_of(name):
        z, pictures = ours(root / f"{name}.safetensors", (height, width))
        assert pictures.shape == (2, height, width, 3) and pictures.std() > 0.05
        rounding = 1e-5 * max(1, float(z.std()))  # of latents, which the pictures clip
        torch.testing.assert_close(drawn[f"{name} {height}x{width}"], pictures, rtol=0, atol=rounding)
        torch.testing.assert_close(drawn[f"{name} {height}x{width} latents"] / z.std(), z / z.std(), rtol=0, atol=1e-5)


def test_a_folder_that_diffusers_saves_again(root: Path, drawn: dict[str, Any]) -> None:
    """It keeps its code, its classes and its weights, and takes other schedulers and precisions."""
    assert torch.equal(drawn["saved again"], drawn["again"])
    assert (root / "nit_again/transformer/transformer_nit.py").read_text() == code(root / "nit")
    before, after = (json.loads((root / name / "model_index.json").read_text()) for name in ("nit", "nit_again"))
    assert after == before
    torch.testing.assert_close(drawn["other scheduler"], drawn["again"], rtol=0, atol=0.2)
    assert not torch.equal(drawn["other scheduler"], drawn["again"])
    torch.testing.assert_close(drawn["bfloat16"], drawn["again"], rtol=0, atol=0.1)
    assert not torch.equal(drawn["bfloat16"], drawn["again"])
    expected = ["wolf is no class", "7 is not one of 0 to 6", "multiples of 2", "output_type=jpg", "latents are"]
    assert all(part in error for part, error in zip(expected, drawn["errors"], strict=True)), drawn["errors"]
    again = genfound.load(root / "nit_again")
    assert same(again.net.state_dict(), genfound.load(root / "nit").net.state_dict()) and again.class_names == NAMES


@pytest.mark.usefixtures("drawn")
def test_the_code_of_folders_has_no_undefined_or_unused_name(root: Path) -> None:
    files = [*root.glob("*/pipeline_*.py"), *root.glob("*/transformer/*.py")]
    assert len(files) >= 2 * len(FAMILIES)
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F", *files]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


def code(folder: Path) -> str:
    return next((folder / "transformer").glob("*.py")).read_text()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


@pytest.mark.parametrize("name", FAMILIES)
def test_there_and_back(name: str, tmp_path: Path) -> None:
    """Also from transformer/ alone, whose weights have official names and shapes."""
    folder = folder_of(tmp_path, name)
    first, back = genfound.load(tmp_path / f"{name}.safetensors"), genfound.load(folder)
    assert same(first.net.state_dict(), back.net.state_dict())
    assert (back.class_names, back.sizes) == (NAMES, [SIZE.get(name, (16, 16))])
    assert back.config["objective"] == first.config["objective"]
    assert type(back.tokenizer) is type(first.tokenizer)
    convert(folder, str(tmp_path / "official.safetensors"), "official")
    official = checkpoint_io.read_safetensors(tmp_path / "official.safetensors")
    official = {key: tensor for key, tensor in official.items() if not key.startswith("feat_rope.")}  # computed
    held = checkpoint_io.read_safetensors(folder / "transformer/diffusion_pytorch_model.safetensors")
    twice = {key for key in official if name == "dig_skip" and key.endswith(("norm1.weight", "norm2.weight"))}
    assert same({key: tensor for key, tensor in official.items() if key not in twice}, held)
    assert same(first.net.state_dict(), genfound.load(folder / "transformer").net.state_dict())


@pytest.mark.parametrize("name", ["dit", "nit", "fitv2", "jit_published"])
def test_without_our_note_the_config_decides(name: str, tmp_path: Path) -> None:
    """As after a training in diffusers."""
    folder = folder_of(tmp_path, name)
    file = folder / "transformer/diffusion_pytorch_model.safetensors"
    safetensors.torch.save_file(checkpoint_io.read_safetensors(file), file, {"format": "pt"})
    first, back = genfound.load(tmp_path / f"{name}.safetensors"), genfound.load(folder, tokenizer="pixel")
    assert same(first.net.state_dict(), back.net.state_dict()) and back.class_names == NAMES
    ignored = ("attention", "activation_checkpointing", "channels", "learn_sigma")
    told = {key: value for key, value in first.config["model"].items() if key not in ignored}
    assert told.items() <= back.config["model"].items()


DECODED = FAMILIES["dit_decoded"][:-1]


def test_native_dit_is_that_of_diffusers(tmp_path: Path) -> None:
    """Its network is ours but for the frequencies of time; a padded label table says how many classes there are."""
    import diffusers

    folder = folder_of(tmp_path, "dit_decoded", *DECODED, native="auto")
    assert not list(folder.rglob("*.py"))
    first, back = genfound.load(tmp_path / "dit_decoded.safetensors"), genfound.load(folder)
    assert same(first.net.state_dict(), back.net.state_dict()) and back.class_names == NAMES
    pipe = diffusers.DiTPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    x, t = torch.stack(latents([(8, 8)] * 2, 4)), torch.tensor([20.0, 700.0])
    with torch.no_grad():
        want = back.net(Dense(2).to_batch(list(x), torch.tensor([1, 7])), t)
        plain = pipe.transformer(x, t, torch.tensor([1, 1000])).sample
        for block in pipe.transformer.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0
        torch.testing.assert_close(pipe.transformer(x, t, torch.tensor([1, 1000])).sample, want, rtol=0, atol=2e-5)
    assert (plain - want).abs().max() > 1e-3
    assert pipe(class_labels=[1], num_inference_steps=2, output_type="np").images.shape == (1, 64, 64, 3)
    named = convert(folder, str(tmp_path / "x"), "diffusers", native=False)
    assert "transformer_dit.py" in {file.name for file in (named.file / "transformer").iterdir()}


def test_a_native_dit_as_others_keep_it(tmp_path: Path) -> None:
    """The class of older folders, weights in shards, in pickles, and of a variant; no note and no header."""
    folder = folder_of(tmp_path, "dit_decoded", *DECODED, native=True)
    inner = folder / "transformer"
    file = inner / "diffusion_pytorch_model.safetensors"
    state = checkpoint_io.read_safetensors(file)
    first = genfound.load(tmp_path / "dit_decoded.safetensors").net.state_dict()
    config = json.loads((inner / "config.json").read_text())
    del config["norm_eps"]
    (inner / "config.json").write_text(json.dumps({**config, "_class_name": "Transformer2DModel"}))
    file.unlink()
    torch.save({**state, "pos_embed.pos_embed": torch.zeros(1, 16, 32)}, inner / "diffusion_pytorch_model.bin")
    loaded = genfound.load(folder)
    assert same(loaded.net.state_dict(), first) and loaded.class_names == NAMES and loaded.sizes == [(64, 64)]
    (inner / "diffusion_pytorch_model.bin").unlink()
    safetensors.torch.save_file(state, inner / "diffusion_pytorch_model.fp16.safetensors")
    assert same(genfound.load(folder).net.state_dict(), first)
    (inner / "diffusion_pytorch_model.fp16.safetensors").unlink()
    halves = [dict(list(state.items())[::2]), dict(list(state.items())[1::2])]
    names = [f"diffusion_pytorch_model-0000{k}-of-00002.safetensors" for k in (1, 2)]
    for half, name in zip(halves, names, strict=True):
        safetensors.torch.save_file(half, inner / name)
    weight_map = {key: name for half, name in zip(halves, names, strict=True) for key in half}
    index = inner / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert same(genfound.load(folder).net.state_dict(), first)
    index.write_text(json.dumps({"weight_map": {"x": "../../secret.safetensors"}}))
    with pytest.raises(ValueError, match=r"secret.safetensors is no file beside it"):
        genfound.load(folder)


def test_a_folder_of_another_collection(tmp_path: Path) -> None:
    """Official names under their own class, and keys that mean other things than ours."""
    inner = folder_of(tmp_path, "nit_official") / "transformer"
    state = checkpoint_io.read_safetensors(inner / "diffusion_pytorch_model.safetensors")
    shutil.rmtree(tmp_path / "nit_official")
    inner.mkdir(parents=True)
    safetensors.torch.save_file(
        state | {"projector.0.weight": torch.zeros(3)}, inner / "diffusion_pytorch_model.safetensors"
    )
    config = {"_class_name": "NiTTransformer2DModel", "input_size": 16, "hidden_size": 32, "depth": 2, "num_heads": 2}
    config |= {"class_dropout_prob": 0.1, "num_classes": 7, "theta": 10000, "custom_freqs": "normal", "z_dim": 1280}
    (inner / "config.json").write_text(json.dumps(config))
    index = {"_class_name": ["pipeline_nit", "NiTPipeline"], "id2label": {str(k): f"bird {k % 6}" for k in range(7)}}
    (tmp_path / "nit_official/model_index.json").write_text(json.dumps(index))
    loaded = genfound.load(tmp_path / "nit_official", tokenizer="pixel")
    assert same(loaded.net.state_dict(), genfound.load(tmp_path / "nit_official.safetensors").net.state_dict())
    assert (loaded.config["model"]["rope_coords"], loaded.config["model"]["heads"]) == ("official", 2)
    assert loaded.class_names[:2] == ["bird 0 (0)", "bird 1"]


def test_positions_of_another_collection_tell_the_fine_tuning_to_512_pixels(tmp_path: Path) -> None:
    for frequencies, release in {"normal": None, "ntk-aware": "fitv2_hr"}.items():
        config = {"_class_name": "FiTTransformer2DModel", "custom_freqs": frequencies}
        (tmp_path / "config.json").write_text(json.dumps(config))
        found = read.folder(tmp_path)
        assert found is not None and found.family == release


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (Path("hostile"), "ran"))


def test_no_code_of_a_folder_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = folder_of(tmp_path, "nit")
    for file in folder.rglob("*.py"):
        file.write_text('from pathlib import Path\nPath("hostile").write_text("ran")\n')
    genfound.load(folder)
    inner = folder / "transformer"
    config = json.loads((inner / "config.json").read_text())
    scaling = {"_target_": "pathlib.Path.write_text", "self": "hostile", "data": "ran"}
    file = inner / "diffusion_pytorch_model.safetensors"
    state = checkpoint_io.read_safetensors(file)
    (inner / "config.json").write_text(json.dumps({**config, "rope_scaling": scaling}))
    safetensors.torch.save_file(state, file)
    with pytest.raises(ValueError, match="is code outside genfound"):
        genfound.load(folder)
    file.unlink()
    (inner / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps({"x": Hostile()}))
    with pytest.raises(ValueError, match="bin"):
        genfound.load(folder)
    assert not Path("hostile").exists()


def broken(folder: Path, what: str) -> None:
    """Damage a folder of a native DiT."""
    inner = folder / "transformer"
    file = inner / "diffusion_pytorch_model.safetensors"
    config, state = json.loads((inner / "config.json").read_text()), checkpoint_io.read_safetensors(file)
    if what == "no weights":
        file.unlink()
    elif what == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif what == "heads":
        (inner / "config.json").write_text(json.dumps({**config, "num_attention_heads": 4, "attention_head_dim": 8}))
    elif what == "width":
        (inner / "config.json").write_text(json.dumps({**config, "attention_head_dim": 32}))
    elif what == "word":
        (inner / "config.json").write_text(json.dumps({**config, "num_layers": "two"}))
    elif what == "json":
        (inner / "config.json").write_text("{")
    elif what == "class":
        (inner / "config.json").write_text(json.dumps({**config, "_class_name": "UNet2DModel"}))
    elif what == "no network":
        shutil.rmtree(inner)
    elif what == "copies":
        name = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias"
        safetensors.torch.save_file({**state, name: state[name] + 1}, file)
    else:
        del state["proj_out_2.bias"]
        safetensors.torch.save_file(state, file)


BROKEN = {
    "no weights": "has no weights: no diffusion_pytorch_model.safetensors",
    "cut": "diffusion_pytorch_model.safetensors is damaged",
    "heads": "says heads=4, and its weights 2",
    "width": "says width=64, and its weights 32",
    "word": "says depth=two, which must be a whole number",
    "json": "config.json is damaged",
    "class": "UNet2DModel is no network of ours",
    "no network": "a folder of diffusers without transformer/config.json",
    "copies": "of block 1 is not that of block 0",
    "a tensor": "has no proj_out_2.bias",
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_folders_are_refused_in_a_line(what: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "dit_decoded", *DECODED, native=True)
    broken(folder, what)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        genfound.load(folder)
    assert BROKEN[what] in str(error.value) and "\n" not in str(error.value)


def test_a_folder_is_evaluated_as_the_run_it_is_from(tmp_path: Path) -> None:
    """Also where pictures lie in it, as on the hub."""
    run = untrained_run(tmp_path / "run")
    convert(run, str(tmp_path / "nit"), "diffusers")
    Image.new("RGB", (8, 8)).save(tmp_path / "nit/example.png")
    first, second = (evaluated(tmp_path / name, tmp_path / "references", n=64)[0] for name in ("run", "nit"))
    assert first.figures == second.figures and first.subject["hash"] == second.subject["hash"]


REFUSED = {
    "native=true: this is no DiT of diffusers; model=nit is none": (("model=nit_tiny",), True),
    "its decoder is an AutoencoderKL": (("model=dit_tiny",), True),
    "model.mlp_ratio=4": ((*DECODED, "model.mlp_ratio=2"), True),
    "other steps than objective.schedule=cosine": ((*DECODED, "objective.schedule=cosine"), True),
    "objective.path=linear and objective.prediction=velocity or x0": (("model=sit_tiny", "objective.path=gvp"), "auto"),
    "lightningdit, jit, dig, not model=dim": (("model=dim_tiny",), "auto"),
    "native=maybe is unknown": (("model=nit_tiny",), "maybe"),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_a_folder_is_refused(message: str, tmp_path: Path) -> None:
    overrides, native = REFUSED[message]
    file = file_of(tmp_path, "x", *overrides)
    with pytest.raises(ValueError, match=message):
        convert(file, str(tmp_path / "out"), "diffusers", native=native)
    assert sorted(tmp_path.iterdir()) == [file]


def test_guidance_that_a_folder_has_not_is_named(tmp_path: Path) -> None:
    plain = file_of(tmp_path, "x", "model=sit_tiny")
    assert len(convert(plain, str(tmp_path / "out"), "diffusers").remarks) == 1
    other = file_of(tmp_path, "y", "model=sit_tiny", "guidance.schedule=linear")
    remarks = convert(other, str(tmp_path / "other"), "diffusers").remarks
    assert remarks[0].startswith("without guidance.schedule=linear: its pipeline guides")


def test_without_a_decoder_there_is_none_in_the_folder(tmp_path: Path) -> None:
    file = file_of(tmp_path, "x", "model=sit_tiny", "tokenizer=sd_vae", "tokenizer.weights=/nowhere")
    done: Conversion = convert(file, str(tmp_path / "out"), "diffusers")
    assert "without a vae: tokenizer.weights=/nowhere" in done.remarks[0]
    assert json.loads((tmp_path / "out/model_index.json").read_text())["vae"] == [None, None]
