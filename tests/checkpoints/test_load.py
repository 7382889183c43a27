"""Official checkpoints of every family and layout of file: loaded, converted there and back, refused when wrong."""

from __future__ import annotations

import argparse
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

import genfound
from genfound import build
from genfound.backbones.base import Backbone
from genfound.backbones.dit import DiT
from genfound.checkpoints import convert, formats, initialise, load
from genfound.checkpoints.official.families import FAMILIES, release_of
from genfound.layouts import Dense, Packed, Padded
from genfound.runtime import checkpoint_io, run_directory
from genfound.tokenizers import LatentSpec, PixelTokenizer, Undecodable
from genfound.training import fit
from tests.evaluation.runs import untrained_run
from tests.helpers import composed, latents, randomise, run_dir, training_module

GRID = (4, 4)
CLASSES = 7
MODELS = {
    "dit": "dit_s",
    "sit": "sit_s",
    "fit": "fit_b",
    "fitv2": "fitv2_b",
    "nit": "nit_s",
    "dit_moe": "dit_moe_s_8e2a",
    "lightningdit": "lightningdit_b",
    "jit": "jit_b",
    "dig": "dig_s",
    "dim": "dim_l",
    "ldm": "ldm_4",
}
SMALL = {"width": 32, "depth": 2, "heads": 2}
HEADS = {"num_heads": 2}


def told(family: str) -> dict[str, Any]:
    """What the shapes of `small` do not tell."""
    more = {"in_context_start": 1} if family == "jit" else {"family": family} if family in ("dit", "sit") else {}
    return more if family == "dim" else {**HEADS, **more}


def small(family: str) -> tuple[dict[str, Any], Backbone]:
    """Options and a network of a family, every parameter random."""
    config = composed(f"model={MODELS[family]}", f"experiment=official/{family}")
    rank = {"adaln_rank": 8} if config["model"].get("adaln_rank") else {}
    own = {"jit": {"in_context_start": 1}, "dim": {"table": list(GRID), "states": 4}}.get(family, {})
    sizes = {key: value for key, value in SMALL.items() if key in config["model"]}
    config = {**config, "model": {**config["model"], **sizes, **rank, **own}}
    net = build.net(config, build.published_spec(config), CLASSES)
    return config, randomise(net).eval()


def official_state(family: str) -> dict[str, Tensor]:
    """The network of `small` under official names; NiT's with a projector."""
    config, net = small(family)
    state = FAMILIES[family].theirs(net.state_dict(), config["model"]["patch_size"], GRID)
    state |= FAMILIES[family].tables(config, GRID)
    if family == "nit":
        state["projector.0.weight"] = torch.randn(8, 32)
    if "pos_embed" in state:
        state["pos_embed"] += 1e-4 * torch.rand_like(state["pos_embed"])  # as averaging rounds it
    return {key: tensor.contiguous() for key, tensor in state.items()}


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


def output(net: Backbone, layout: str) -> Tensor:
    spec = net.token_spec
    side = 4 * spec.patch_size
    kind = {"dense": Dense, "padded": Padded, "packed": Packed}[layout](spec.patch_size)
    batch = kind.to_batch(latents([(side, side)] * 2, spec.channels), torch.tensor([1, 5]))
    with torch.no_grad():
        return net(batch, torch.tensor([0.3, 0.8]))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_flat_file_gives_the_same_network(family: str, tmp_path: Path) -> None:
    file = tmp_path / f"{family}-small.pt"
    torch.save(official_state(family), file)
    loaded = genfound.load(file, **told(family))
    config, net = small(family)
    assert len(loaded.class_names) == CLASSES and not loaded.net.training
    assert same(loaded.net.state_dict(), net.state_dict())
    layout = config["layout"]["name"]
    assert torch.equal(output(loaded.net, layout), output(net, layout))
    if family == "jit":
        assert isinstance(loaded.tokenizer, PixelTokenizer)
    else:
        assert isinstance(loaded.tokenizer, Undecodable) and "FOLDER" in loaded.tokenizer.reason


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_is_equal_bit_by_bit(family: str, tmp_path: Path) -> None:
    state = {key: tensor.half() for key, tensor in official_state(family).items()}
    if "pos_embed" in state:
        state["pos_embed"] = official_state(family)["pos_embed"]
    safetensors.torch.save_file(state, tmp_path / f"{family}.safetensors")
    ours = convert.convert(tmp_path / f"{family}.safetensors", f"{tmp_path}/ours/", None, **told(family))
    assert (ours.format, ours.file) == ("genfound", tmp_path / "ours" / f"{family}.safetensors")
    assert same(
        genfound.load(ours.file).net.state_dict(),
        genfound.load(tmp_path / f"{family}.safetensors", **told(family)).net.state_dict(),
    )
    back = convert.convert(ours.file, f"{tmp_path}/back.pt", None)
    assert back.format == "official"
    written = torch.load(back.file, weights_only=True)
    if family == "jit":
        assert written.keys() == {"model", "model_ema1", "model_ema2"}
        written = {key.removeprefix("net."): value for key, value in written["model_ema1"].items()}
    assert same(written["state_dict"] if family == "ldm" else written, state)


def wrapped(state: Mapping[str, Tensor], kind: str) -> Any:
    raw = {key: tensor + 1 for key, tensor in state.items() if key != "pos_embed"} | {
        key: tensor for key, tensor in state.items() if key == "pos_embed"
    }
    args = argparse.Namespace(model="DiT-S/2", num_classes=CLASSES)
    return {
        "training": {"model": raw, "ema": state, "opt": {"step": 1}, "args": args},
        "compiled": {"model": {f"_orig_mod.{k}": v for k, v in raw.items()}, "ema": state},
        "distributed": {"ema": {f"module._orig_mod.{k}": v for k, v in state.items()}},
        "lightning": {"state_dict": {f"net.{k}": v for k, v in state.items()}, "epoch": 3},
    }[kind]


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
@pytest.mark.parametrize("kind", ["training", "compiled", "distributed", "lightning"])
def test_outer_keys_and_prefixes(kind: str, suffix: str, tmp_path: Path) -> None:
    state = official_state("dit")
    file = tmp_path / f"dit{suffix}"
    torch.save(wrapped(state, kind), file)
    net = small("dit")[1]
    assert same(genfound.load(file, **told("dit")).net.state_dict(), net.state_dict())
    if kind in ("training", "compiled"):
        raw = genfound.load(file, weights="raw", **told("dit")).net.state_dict()
        assert torch.equal(raw["final_layer.linear.bias"], net.state_dict()["final_layer.linear.bias"] + 1)
    if kind == "distributed":
        with pytest.raises(ValueError, match="holds only averaged weights"):
            genfound.load(file, weights="raw", **told("dit"))


@pytest.mark.parametrize("qk_norm", [False, True])
def test_repas_sit_is_told_by_its_projectors(qk_norm: bool, tmp_path: Path) -> None:
    """Its time runs from data to noise, it needs no family, and comes out as it was, the projectors too."""
    config = composed("model=sit_s", "experiment=official/sit_repa")
    config = {**config, "model": {**config["model"], **SMALL, "qk_norm": qk_norm}}
    net = randomise(build.net(config, build.published_spec(config), CLASSES)).eval()
    projector = {f"projectors.0.{i}.{kind}": torch.randn(*shape) for i, out, into in ((0, 8, 32), (2, 8, 8), (4, 6, 8))
                 for kind, shape in (("weight", (out, into)), ("bias", (out,)))}  # fmt: skip
    state = FAMILIES["sit"].theirs(net.state_dict(), 2, GRID) | projector
    torch.save(state, tmp_path / "last.pt")
    loaded = genfound.load(tmp_path / "last.pt", **HEADS)
    assert loaded.net.time == "data0" and torch.equal(output(loaded.net, "dense"), output(net, "dense"))
    assert loaded.config["sampler"]["diffusion"] == "linear" and loaded.config["guidance"]["interval"] == [0.0, 0.7]
    convert.convert(tmp_path / "last.pt", f"{tmp_path}/ours.safetensors", None, **HEADS)
    convert.convert(tmp_path / "ours.safetensors", f"{tmp_path}/again.safetensors", None)
    assert same(safetensors.torch.load_file(tmp_path / "again.safetensors"), state)


def test_averages_of_lightningdit_have_clean_names_and_live_weights_those_of_ddp(tmp_path: Path) -> None:
    state, file = official_state("lightningdit"), tmp_path / "0080000.pt"
    raw = {f"module.{key}": tensor + key.startswith("final_layer") for key, tensor in state.items()}
    torch.save({"model": raw, "ema": state, "opt": {}, "config": {"model": "LightningDiT-B/1"}}, file)
    ema, live = (genfound.load(file, weights).net.state_dict() for weights in ("ema", "raw"))
    own = small("lightningdit")[1].state_dict()
    assert same(ema, own)
    assert torch.equal(live["final_layer.linear.bias"], own["final_layer.linear.bias"] + 1)


def test_a_training_checkpoint_of_jit_gives_its_first_average_and_its_noise(tmp_path: Path) -> None:
    state, file, told_jit = official_state("jit"), tmp_path / "checkpoint-last.pth", told("jit")
    sets = {"model": 1, "model_ema1": 0, "model_ema2": 2}
    content = {
        part: {f"net.{key}": tensor + more * key.startswith("final_layer") for key, tensor in state.items()}
        for part, more in sets.items()
    }
    args = argparse.Namespace(model="JiT-B/16", noise_scale=2.0)
    torch.save({**content, "optimizer": {}, "epoch": 3, "args": args}, file)
    own = small("jit")[1].state_dict()
    for weights, more in (("ema", 0), ("raw", 1)):
        loaded = genfound.load(file, weights, **told_jit)
        assert torch.equal(loaded.net.state_dict()["final_layer.linear.bias"], own["final_layer.linear.bias"] + more)
        assert loaded.objective.noise_scale == 2
    with pytest.raises(ValueError, match=r"its shapes do not tell in_context_start; say hints\.in_context_start="):
        genfound.load(file)


def test_a_jit_with_patches_of_32_is_the_one_of_512_pixels() -> None:
    options = {"width": 768, "depth": 12, "patch_size": 32}
    config = load._config("jit", None, options, Path("jit-b-32.pth"))
    assert config["objective"]["noise_scale"] == 2 and config["data"]["size"] == 512
    assert config["model"]["in_context_start"] == 4 and config["sampler"]["guidance_at"] == "slope"
    config = load._config("jit", None, {**options, "patch_size": 16}, Path("jit-b-16.pth"))
    assert config["objective"]["noise_scale"] == 1 and config["data"]["size"] == 256


@pytest.mark.parametrize("norm", ["layernorm", "w_rmsnorm"])
@pytest.mark.parametrize("qk_norm", ["none", "w_rmsnorm", "wb_layernorm"])
def test_weights_of_lightningdit_tell_its_norms(norm: str, qk_norm: str, tmp_path: Path) -> None:
    """Its released code has two of these pairs; others go out and come in too."""
    config, _ = small("lightningdit")
    config = {**config, "model": {**config["model"], "norm": norm, "qk_norm": qk_norm}}
    net, file = build.net(config, build.published_spec(config), CLASSES), tmp_path / "weights.pt"
    family = FAMILIES["lightningdit"]
    torch.save(family.theirs(net.state_dict(), 1, GRID) | family.tables(config, GRID), file)
    loaded = genfound.load(file)
    assert (loaded.config["model"]["norm"], loaded.config["model"]["qk_norm"]) == (norm, qk_norm)
    assert same(loaded.net.state_dict(), net.state_dict())


def test_a_lightningdit_without_its_flags_looks_like_dit(tmp_path: Path) -> None:
    options = {"ffn": "mlp", "norm": "layernorm", "positions": "table"}
    config, _ = small("lightningdit")
    model = {**config["model"], **options}
    net = randomise(build.net({**config, "model": model}, build.published_spec(config), CLASSES))
    file = tmp_path / "plain.pt"
    torch.save(FAMILIES["lightningdit"].theirs(net.state_dict(), 1, GRID), file)
    with pytest.raises(ValueError, match=r"or, of one without its flags, hints\.family=lightningdit$"):
        genfound.load(file, **HEADS)
    loaded = genfound.load(file, family="lightningdit", **HEADS)
    assert same(loaded.net.state_dict(), net.state_dict()) and loaded.config["model"].items() >= options.items()


@pytest.mark.parametrize("family, ema_first", [("nit", True), ("fitv2", False)])
@pytest.mark.parametrize("names", formats.ACCELERATE)
def test_accelerate_folders_hold_two_sets(family: str, ema_first: bool, names: tuple[str, str], tmp_path: Path) -> None:
    state = official_state(family)
    other = {key: tensor + 1 for key, tensor in state.items()}
    for name, tensors in zip(names, (state, other), strict=True):
        save = safetensors.torch.save_file if name.endswith("safetensors") else torch.save
        save(tensors, tmp_path / name)
    bias = "final_layer.linear.bias"
    for weights in ("ema", "raw"):
        expected = state if (weights == "ema") == ema_first else other
        assert torch.equal(genfound.load(tmp_path, weights, **HEADS).net.state_dict()[bias], expected[bias])


def test_what_shapes_do_not_tell_is_asked_for(tmp_path: Path) -> None:
    torch.save(official_state("sit"), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"DiT and SiT alike; say hints\.family=dit or"):
        genfound.load(tmp_path / "weights.pt", **HEADS)
    with pytest.raises(ValueError, match=r"its shapes do not tell heads; say hints\.num_heads="):
        genfound.load(tmp_path / "weights.pt", family="sit")
    loaded = genfound.load(tmp_path / "weights.pt", family="sit", **HEADS)
    assert loaded.net.time == "data1"
    with pytest.raises(ValueError, match="layers is not an option of model=sit"):
        genfound.load(tmp_path / "weights.pt", family="sit", layers=3, **HEADS)


@pytest.mark.parametrize("name", ["conditional.pt", "dit.pt", "sit-small.pt", "my_DiT-XL-2-256x256.pt", "DiT/x.pt"])
def test_no_part_of_a_name_tells_a_family(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    torch.save(official_state("sit"), file)
    with pytest.raises(ValueError, match=rf"{file}: these weights fit DiT and SiT alike; say hints\.family=dit or"):
        genfound.load(file, **HEADS)


@pytest.mark.parametrize(
    ("name", "args", "family"),
    [
        ("DiT-XL-2-256x256.pt", {}, "dit"),
        ("SiT-XL-2-256.pt", {}, "sit"),
        ("conditional.pt", {"model": "SiT-S/2"}, "sit"),
        ("DiT-XL-2-512x512.pt", {"path_type": "Linear"}, "sit"),
        ("0050000.pt", {"model": "DiT-S/2"}, "dit"),
    ],
)
def test_published_names_and_arguments_tell_it(name: str, args: dict[str, str], family: str, tmp_path: Path) -> None:
    torch.save({"ema": official_state("dit"), "args": argparse.Namespace(**args)}, tmp_path / name)
    assert genfound.load(tmp_path / name, **HEADS).config["model"]["_target_"].split(".")[-2] == family


@pytest.mark.parametrize(
    ("name", "rule"),
    [("FiTv2_XL/model_ema.safetensors", "normal"), ("FiTv2_XL_HRFT/model_ema.safetensors", "ntk-aware")],
)
def test_a_fine_tuning_is_told_by_its_published_name(name: str, rule: str) -> None:
    size, path = {"width": 1152, "depth": 36}, Path(name)
    assert load._config("fitv2", release_of(path, {}), size, path)["model"]["rope_scaling"]["rule"] == rule
    for other in ("three/chromatic.pt", "fitv2_hr.pt"):
        with pytest.raises(ValueError, match=r"alike; say hints\.family=fitv2 or hints\.family=fitv2_hr"):
            load._config("fitv2", release_of(Path(other), {}), size, Path(other))


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize("family", ["nit", "dit"])
def test_a_pixel_model_of_the_official_format_is_told_its_tokenizer(family: str, tmp_path: Path) -> None:
    config, _ = small(family)
    net = randomise(build.net(config, LatentSpec(3, 1), CLASSES))
    file = tmp_path / "pixels.pt"
    torch.save(FAMILIES[family].theirs(net.state_dict(), config["model"]["patch_size"], GRID), file)
    loaded = genfound.load(file, **told(family))
    assert isinstance(loaded.tokenizer, Undecodable) and loaded.tokenizer.spec.channels == 3
    assert f"{file} is a model of 3 channels" in loaded.tokenizer.reason
    assert "say hints.tokenizer=" in loaded.tokenizer.reason
    loaded = genfound.load(file, tokenizer="pixel", **told(family))
    assert isinstance(loaded.tokenizer, PixelTokenizer) and isinstance(loaded.net, Backbone)
    side = GRID[0] * config["model"]["patch_size"]
    assert family == "nit" or loaded.sizes == [(side, side)]
    ours = convert.convert(file, f"{tmp_path}/ours/", None, tokenizer="pixel", **told(family)).file
    assert isinstance(genfound.load(ours).tokenizer, PixelTokenizer)
    with pytest.raises(ValueError, match=r"hints\.tokenizer=vq_f4 needs weights; give the folder"):
        genfound.load(file, tokenizer="vq_f4", **told(family))


@pytest.mark.usefixtures("no_hub")
def test_a_folder_tells_which_autoencoder_it_is(tmp_path: Path) -> None:
    build.tokenizer(composed("tokenizer=vq_f4", "tokenizer.weights=random_tiny")).model.save_pretrained(tmp_path)
    config, _ = small("nit")
    net = build.net(config, LatentSpec(3, 4), CLASSES)
    torch.save(FAMILIES["nit"].theirs(net.state_dict(), config["model"]["patch_size"], GRID), tmp_path / "x.pt")
    loaded = genfound.load(tmp_path / "x.pt", tokenizer=str(tmp_path), **HEADS)
    assert type(loaded.tokenizer).__name__ == "VQF4" and loaded.tokenizer.spec == (3, 4)


def test_kernels_are_chosen_where_a_model_is_loaded(tmp_path: Path) -> None:
    run = untrained_run(tmp_path / "run", "model.attention=varlen", "trainer.accelerator=cpu")
    with pytest.raises(ValueError, match=r"model\.attention=varlen cannot run on cpu"):
        build.build_run(run_directory.read_config(run), 1).report()
    ours = convert.convert(run, f"{tmp_path}/ours.safetensors", "genfound").file
    for origin in (run, ours):
        loaded = genfound.load(origin)
        assert genfound.sample(loaded, [1], (16, 16), batch=1).shape == (1, 16, 16, 3)
    guidance = {**composed("guidance=autoguidance")["guidance"], "weights": str(run), "scale": 2.0}
    assert genfound.sample(loaded, [1], (16, 16), batch=1, guidance=guidance).shape == (1, 16, 16, 3)


def test_another_number_of_classes_is_refused(tmp_path: Path) -> None:
    torch.save(official_state("nit"), tmp_path / "nit.pt")
    with pytest.raises(ValueError, match=r"does not fit NiT: 1 of another shape .y_embedder"):
        genfound.load(tmp_path / "nit.pt", num_classes=1000)


def test_arguments_of_the_training_script_tell_the_family_and_the_path(tmp_path: Path) -> None:
    args = argparse.Namespace(path_type="GVP", prediction="noise")
    torch.save({"ema": official_state("sit"), "args": args}, tmp_path / "0050000.pt")
    loaded = genfound.load(tmp_path / "0050000.pt", **HEADS)
    assert (loaded.config["objective"]["path"], loaded.config["objective"]["prediction"]) == ("gvp", "noise")


def test_published_sizes_need_no_hint() -> None:
    config = composed("model=nit_xl")
    with torch.device("meta"):
        state = FAMILIES["nit"].theirs(
            build.net(config, LatentSpec(32, 32), 1000).state_dict(), config["model"]["patch_size"], GRID
        )
    options = FAMILIES["nit"].options(state)
    assert (options["width"], options["depth"], options["heads"], options["num_classes"]) == (1152, 28, 16, 1000)


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("owned",)


WRONG = {
    "truncated": "is damaged or is not a checkpoint of tensors",
    "truncated safetensors": "is damaged",
    "web page": "is a web page",
    "code": "is damaged or is not a checkpoint of tensors",
    "code inside": "is damaged or is not a checkpoint of tensors",
    "other architecture": "of none of dit, sit, fit",
    "no tensors": "holds no state dict",
    "missing key": "does not fit DiT: 1 missing .blocks.1.mlp.fc1.bias",
    "unknown key": "does not fit DiT: 1 unexpected .extra",
    "empty": "is damaged",
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_files_are_one_line(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / ("dit.safetensors" if "safetensors" in kind else "dit.pt")
    state = official_state("dit")
    if kind == "truncated safetensors":
        safetensors.torch.save_file(state, file)
    else:
        torch.save(state, file)
    whole = file.read_bytes()
    if kind.startswith("truncated"):
        file.write_bytes(whole[: len(whole) // 2])
    elif kind == "web page":
        file.write_text("<!DOCTYPE html><html></html>")
    elif kind == "code":
        file.write_bytes(pickle.dumps(Malicious()))
    elif kind == "code inside":
        torch.save({**state, "x": Malicious()}, file)
    elif kind == "other architecture":
        torch.save({"conv.weight": torch.zeros(3)}, file)
    elif kind == "no tensors":
        torch.save({"epoch": 3}, file)
    elif kind == "missing key":
        torch.save({k: v for k, v in state.items() if k != "blocks.1.mlp.fc1.bias"}, file)
    elif kind == "unknown key":
        torch.save({**state, "extra": torch.zeros(1)}, file)
    else:
        file.write_bytes(b"")
    with pytest.raises(ValueError, match=WRONG[kind]) as error:
        genfound.load(file, family="dit", **HEADS)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "owned").exists()


TINY = [
    "model=dit_tiny", "model.width=32", "model.depth=2", "model.heads=2", "logger=jsonl", "trainer.max_steps=1",
    "callbacks.preview.every=1000000", "callbacks.validation.images=16", "sampler.steps=2", "budget.images=100",
    "sample.batch=4",
    "optimizer.lr=0", "optimizer.weight_decay=0",
]  # fmt: skip


def test_a_run_starts_from_weights_and_says_what_is_new(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(run_dir(tmp_path / "first", *TINY))
    first = genfound.load(tmp_path / "first").net.state_dict()
    fit(run_dir(tmp_path / "second", *TINY, "seed=1", f"init_from={tmp_path / 'first'}"))
    assert "starting from the weights of" in capsys.readouterr().out
    assert same(genfound.load(tmp_path / "second").net.state_dict(), first)
    written = convert.convert(tmp_path / "first", f"{tmp_path}/dit.pt", "official")
    state = torch.load(written.file, weights_only=True)
    state["y_embedder.embedding_table.weight"] = torch.randn(4, 32)
    torch.save(state, tmp_path / "dit.pt")
    fit(run_dir(tmp_path / "third", *TINY, f"init_from={tmp_path / 'dit.pt'}"))
    assert "the label table is new" in capsys.readouterr().out
    third = genfound.load(tmp_path / "third").net.state_dict()
    changed = [key for key in third if not torch.equal(third[key], first[key])]
    assert all(key.endswith(initialise.TABLES) for key in changed)


def test_one_expert_becomes_several(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moe = [word.replace("dit_tiny", "dit_moe_tiny") for word in TINY]
    untrained_run(tmp_path / "one", "model.experts=1", "model.top_k=1", of=moe)
    fit(run_dir(tmp_path / "many", *moe, "model.experts=4", f"init_from={tmp_path / 'one'}"))
    assert "every expert begins as a copy" in capsys.readouterr().out
    one, many = (genfound.load(tmp_path / name).net.state_dict() for name in ("one", "many"))
    name = next(key for key in one if "experts" in key)
    assert torch.equal(many[name], one[name].repeat(4, 1, 1))
    untrained_run(tmp_path / "plain", of=TINY)
    with pytest.raises(ValueError, match="no experts, and a GELU MLP cannot become a SwiGLU"):
        fit(run_dir(tmp_path / "wrong", *moe, f"init_from={tmp_path / 'plain'}"))


def test_a_weaker_network_guides(tmp_path: Path) -> None:
    for name in ("strong", "weak"):
        fit(run_dir(tmp_path / name, *TINY, f"seed={len(name)}", "optimizer.lr=0.1", "ema.decays=[0.1]"))
    loaded = genfound.load(tmp_path / "strong")
    option = composed("guidance=autoguidance")["guidance"]
    drawn = {}
    for scale in (1.0, 3.0):
        guidance = {**option, "weights": str(tmp_path / "weak"), "scale": scale}
        drawn[scale] = genfound.sample(loaded, [1], guidance=guidance, batch=1)
    plain = genfound.sample(loaded, [1], guidance={"name": "none"}, batch=1)
    assert (drawn[1.0] == plain).all() and (drawn[3.0] != plain).any()


def test_no_initial_values_are_drawn_for_weights_that_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, drawn = untrained_run(tmp_path / "run", of=TINY), []
    monkeypatch.setattr(Backbone, "materialise", lambda *_: drawn.append("all"))
    average = checkpoint_io.read(load.newest_checkpoint(run))["ema"]["0.9"]
    before, loaded = torch.get_rng_state(), genfound.load(run)
    assert all(torch.equal(value, average[name]) for name, value in loaded.net.state_dict().items())
    assert not drawn and torch.equal(torch.get_rng_state(), before)


def test_buffers_that_no_file_holds_are_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, initialise_ = DiT.__init__, DiT.initialise

    def make(self: DiT, **options: Any) -> None:
        made(self, **options)
        self.register_buffer("computed", torch.empty(3), persistent=False)

    def fill(self: DiT, *rng: Any) -> None:
        initialise_(self, *rng)
        if hasattr(self, "computed"):  # not yet where the network itself calls this
            self.computed.copy_(torch.arange(3.0))

    monkeypatch.setattr(DiT, "__init__", make)
    monkeypatch.setattr(DiT, "initialise", fill)
    run = untrained_run(tmp_path / "run", of=TINY)
    net, average = genfound.load(run).net, checkpoint_io.read(load.newest_checkpoint(run))["ema"]["0.9"]
    assert net.computed.tolist() == [0, 1, 2]  # type: ignore[operator]
    assert all(torch.equal(value, average[name]) for name, value in net.state_dict().items())


def test_only_the_named_parameters_are_trained(tmp_path: Path) -> None:
    untrained_run(tmp_path / "start", of=TINY)
    trained = [*TINY, "optimizer.lr=0.01", "optimizer.warmup_images=0", "optimizer.trainable=[adaLN,bias]"]
    fit(run_dir(tmp_path / "run", *trained, f"init_from={tmp_path / 'start'}"))
    before = genfound.load(tmp_path / "start").net.state_dict()
    after = genfound.load(tmp_path / "run", "raw").net.state_dict()
    changed = {key for key in after if not torch.equal(after[key], before[key])}
    assert changed and all("adaLN" in key or "bias" in key for key in changed)
    assert genfound.load(tmp_path / "run").net.state_dict().keys() == after.keys()


def test_samples_are_latents_where_the_autoencoder_is_absent(tmp_path: Path) -> None:
    torch.save(official_state("dit"), tmp_path / "dit.pt")
    loaded = genfound.load(tmp_path / "dit.pt", **told("dit"))
    drawn = genfound.sample(loaded, labels=[2], sampler={"name": "ddim", "steps": 2, "eta": 0.0}, guidance=1.5, batch=1)
    assert isinstance(drawn, Tensor) and drawn.shape == (1, 4, 8, 8)


def test_dim_of_512_pixels_is_known_by_its_positions(tmp_path: Path) -> None:
    sizes = {"channels": 4, "patch_size": 2, "width": 1536, "depth": 49, "states": 16, "conv": 3, "expand": 2}
    found = {
        side: load._config("dim", None, {**sizes, "table": [side, side]}, tmp_path / "nnet_ema.pth")
        for side in (16, 32)
    }
    assert [found[side]["model"]["pad"] for side in found] == ["lateral", "cycled"]
    assert [found[side]["guidance"]["scale"] for side in found] == [1.4, 1.7]
    assert [load._side(config, {}) for config in found.values()] == [256, 512]
    assert all(config["model"]["bf16_inputs"] for config in found.values())


def test_a_dim_of_larger_images_begins_with_a_released_one(tmp_path: Path) -> None:
    """Other classes have new rows in both tables."""
    torch.save(official_state("dim"), tmp_path / "nnet_ema.pth")
    config, weak = small("dim")
    larger = {**config, "model": {**config["model"], "table": [8, 8], "pad": "cycled"}}
    module = training_module(build.net(larger, build.published_spec(config), 3))
    before = module.net.state_dict()["label_emb.weight"].clone()
    remarks = initialise.initialise(module, tmp_path / "nnet_ema.pth")
    assert [line.strip() for line in remarks[1:]] == [
        "positions of 4 x 4 tokens are interpolated to 8x8",
        f"the label table is new: {tmp_path}/nnet_ema.pth has 8 rows, this model 4",
    ]
    state, old = module.net.state_dict(), weak.state_dict()
    assert torch.equal(state["label_emb.weight"], before)
    same = [name for name in state if name in old and torch.equal(state[name], old[name])]
    assert state.keys() - same == {
        "additional_embed", "label_emb.weight", "adaln_single.emb.class_embedder.embedding_table.weight"
    }  # fmt: skip
