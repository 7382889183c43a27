from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from genfound.tokenizers import weights
from genfound.tokenizers.dc_ae import DCAE
from genfound.tokenizers.sd_vae import SDVAE
from genfound.tokenizers.weights import CONFIG, WEIGHTS

NAME = "someone/some-vae"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights") / "vae"
    weights.load(SDVAE.kind, "random_tiny").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "vae"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def sd_vae(source: Path | str) -> SDVAE:
    return SDVAE(weights=str(source), posterior="mode", precision="fp32", pixels_per_call=2**20)


def change_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **values}))


def change_keys(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS)


def states_equal(one: SDVAE, two: SDVAE) -> bool:
    a, b = one.model.state_dict(), two.model.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_folder_gives_its_weights(folder: Path) -> None:
    assert states_equal(sd_vae(folder), sd_vae("random_tiny"))


def test_scale_and_shift_are_those_of_the_config(folder: Path) -> None:
    change_config(folder, scaling_factor=1.5305, shift_factor=0.0609)
    codec = sd_vae(folder)
    image = torch.linspace(-1, 1, 3 * 16 * 24).view(1, 3, 16, 24)
    mean = codec.moments(image)[:, :4]
    latents = codec.encode(image)
    assert torch.allclose(latents, (mean - 0.0609) * 1.5305, rtol=0, atol=1e-6)
    assert torch.allclose(codec.decode(latents), codec.model.decode(mean).sample, rtol=0, atol=1e-4)


def test_the_attention_keys_of_older_files_are_understood(folder: Path) -> None:
    def older(state: dict[str, torch.Tensor]) -> None:
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            for key in [key for key in state if f"attentions.0.{new}." in key]:
                state[key.replace(new, old)] = state.pop(key)

    change_keys(folder, older)
    assert states_equal(sd_vae(folder), sd_vae("random_tiny"))


def half(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / CONFIG).unlink(), r"there is no config\.json in this folder"),
        (lambda f: (f / WEIGHTS).unlink(), r"there is no diffusion_pytorch_model\.safetensors in this folder"),
    ],
    ids=["config", "weights"],
)
def test_a_file_that_is_missing_from_a_folder_is_named(folder: Path, damage: Any, message: str) -> None:
    damage(folder)
    with pytest.raises(FileNotFoundError, match=rf"tokenizer\.weights=.*: {message}"):
        sd_vae(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: half(f / WEIGHTS), r"safetensors is damaged: "),
        (lambda f: (f / WEIGHTS).write_bytes(b""), r"safetensors is damaged: "),
        (lambda f: (f / WEIGHTS).write_text("a text file"), r"safetensors is damaged: "),
        (lambda f: half(f / CONFIG), r"config\.json is damaged or is not the config of an autoencoder"),
        (lambda f: (f / CONFIG).write_text("[]"), r"config\.json is damaged or is not the config of an autoencoder"),
        (lambda f: change_keys(f, lambda s: s.pop("quant_conv.bias")), r"1 keys missing \(quant_conv\.bias\)"),
        (lambda f: change_keys(f, lambda s: s.update(z=torch.zeros(1))), r"1 keys unexpected \(z\)"),
        (
            lambda f: change_keys(f, lambda s: s.update({"quant_conv.bias": torch.zeros(3)})),
            r"does not fit .*config\.json: .*size mismatch for quant_conv\.bias",
        ),
        (lambda f: change_config(f, latent_channels=16), r"does not fit .*config\.json: .*size mismatch"),
        (lambda f: change_config(f, latents_mean=[0.0] * 4), r"normalises each channel \(latents_mean\)"),
    ],
    ids=["cut", "empty", "text", "cut config", "list", "missing", "unexpected", "shape", "channels", "per channel"],
)
def test_damage_is_one_line_that_names_the_file(folder: Path, damage: Any, message: str) -> None:
    damage(folder)
    with pytest.raises(ValueError, match=message) as error:
        sd_vae(folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_another_architecture_names_the_tokenizer_that_takes_it(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer=dc_ae takes .* describes AutoencoderKL; choose tokenizer=sd_vae"):
        DCAE(weights=str(folder), precision="fp32", pixels_per_call=2**20)
    change_config(folder, _class_name="AutoencoderTiny")
    with pytest.raises(ValueError, match=r"tokenizer=sd_vae takes AutoencoderKL, .* describes AutoencoderTiny$"):
        sd_vae(folder)


@pytest.mark.parametrize("source", ["photos", "/nowhere/vae", "a/b/c", "./vae"])
def test_a_path_that_is_no_folder_is_never_looked_up(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(FileNotFoundError, match=rf"tokenizer\.weights={source} is not a folder; give one with"):
        sd_vae(source)


def put_into_cache(cache: Path, folder: Path) -> None:
    repository = cache / "models--someone--some-vae"
    shutil.copytree(folder, repository / "snapshots" / "0123abcd")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abcd")


def test_the_cache_of_the_hub_is_used_without_the_network(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_into_cache(cache, folder)
    monkeypatch.setattr(weights, "_download", lambda *_: pytest.fail("asked the network"))
    assert states_equal(sd_vae(NAME), sd_vae("random_tiny"))


@pytest.mark.parametrize("partly", [False, True])
def test_offline_nothing_is_downloaded(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, partly: bool
) -> None:
    if partly:
        (folder / WEIGHTS).unlink()
        put_into_cache(cache, folder)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"HF_HUB_OFFLINE forbids a download; put its .*FOLDER"):
        sd_vae(NAME)


def test_a_failed_download_says_why_and_what_else_to_do(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, *, allow_patterns: list[str], local_files_only: bool) -> str:
        assert allow_patterns == [CONFIG, WEIGHTS]
        if local_files_only:
            raise FileNotFoundError
        raise RuntimeError("the connection broke\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(FileNotFoundError, match=rf"tokenizer\.weights={NAME} is neither .*: the connection broke; put"):
        sd_vae(NAME)


def test_a_download_is_loaded(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, *, allow_patterns: list[str], local_files_only: bool) -> str:
        if local_files_only:
            raise FileNotFoundError
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert states_equal(sd_vae(NAME), sd_vae("random_tiny"))


def test_importing_the_tokenizers_does_not_import_diffusers() -> None:
    modules = "genfound.tokenizers, genfound.tokenizers.sd_vae, genfound.tokenizers.dc_ae, genfound.tokenizers.vq_f4"
    heavy = "{'diffusers', 'huggingface_hub', 'torchvision', 'lightning'}"
    code = f"import sys, {modules}; sys.exit(len({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_processes_of_a_command_never_download(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GENFOUND_LAUNCH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"the processes of a command do not download; put .*genfound\.fetch"):
        sd_vae(NAME)
