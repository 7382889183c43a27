"""Teachers: what they load, refuse and say of an image."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from genfound.alignment import radio, vit
from genfound.alignment.dinov2 import DINOv2
from genfound.alignment.probe import ProbeTeacher
from genfound.alignment.radio import RADIO
from genfound.metrics.probe import Probe
from genfound.runtime.transformers_models import transformers_class
from tests.data.images.test_folder import folder, plain


def pictures(height: int, width: int, count: int = 2) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, height, width), generator=draw, dtype=torch.uint8)


@pytest.mark.parametrize(("teacher", "patch"), [(DINOv2, 14), (RADIO, 16)])
@torch.no_grad()
def test_features_are_a_map_of_the_tokens(teacher: type[vit.VisionTransformer], patch: int) -> None:
    """Each image alone, at any grid, rows before columns."""
    found = teacher(weights="random_tiny")
    images = pictures(48, 80)
    features = found(images, 3, 5)
    assert features.shape == (2, 32, 3, 5) and features.isfinite().all()
    torch.testing.assert_close(found(images[1:], 3, 5), features[1:], atol=1e-5, rtol=0)
    changed = images.clone()
    changed[:, :, :16, 64:] = 0
    if patch == 16:  # without attention a token sees its own patch alone
        for layer in found.model.encoder.layer:
            layer.layer_scale1.lambda1.zero_()
        different = (found(changed, 3, 5) - found(images, 3, 5)).abs().amax(dim=(0, 1)) > 1e-6
        assert different.nonzero().tolist() == [[0, 4]]


@torch.no_grad()
def test_dinov2_of_the_trained_grid_is_that_of_transformers(tmp_path: Path) -> None:
    """In a folder as the hub has it; 56 pixels, normalised as in its training."""
    teacher = DINOv2(weights="random_tiny")
    teacher.model.save_pretrained(tmp_path)
    again = DINOv2(weights=str(tmp_path))
    images = pictures(56, 56)
    features = again(images, 4, 4)
    assert torch.equal(features, teacher(images, 4, 4))
    own = transformers_class("Dinov2WithRegistersModel").from_pretrained(tmp_path).eval()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (DINOv2.mean, DINOv2.std))
    tokens = own((images / 255 - mean) / std).last_hidden_state[:, 5:]  # after the class and four registers
    torch.testing.assert_close(features.flatten(2).transpose(1, 2), tokens, atol=1e-5, rtol=0)


def test_a_released_file_of_radio_is_read_without_its_code(tmp_path: Path) -> None:
    state = {f"base_model.{name}": value for name, value in radio.tiny_state().items()}
    file = tmp_path / "radio.pth.tar"
    torch.save({"state_dict": state, "args": argparse.Namespace(model="vit")}, file)
    images = pictures(32, 48)
    with torch.no_grad():
        released, tiny = (RADIO(weights=w)(images, 2, 3) for w in (str(file), "random_tiny"))
    assert torch.equal(released, tiny)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": 1}, "is no release of RADIO: it has no state_dict"),
        (
            {"state_dict": {"base_model.x": torch.zeros(1)}},
            "is no ViT of RADIO v2.5: 'patch_generator.cls_token.token'",
        ),
    ],
)
def test_other_files_are_no_radio(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        RADIO(weights=str(tmp_path / "file.pth"))


def test_damaged_folders_are_named(tmp_path: Path) -> None:
    DINOv2(weights="random_tiny").model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"is damaged: .*header"):
        DINOv2(weights=str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config\.json does not describe a DINOv2"):
        DINOv2(weights=str(tmp_path))
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged: "):
        RADIO(weights=str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no model\.safetensors in this folder"):
        DINOv2(weights=str(tmp_path))


def test_a_probe_teaches_what_it_has_learned_of_the_images(tmp_path: Path) -> None:
    """It is trained once, and its maps have one place for each token."""
    for number in range(8):
        plain(tmp_path / f"images/{number % 2}/{number}.png", 24, 16, (200 * (number % 2), 0, 10 * number))
    source, runs = folder(tmp_path / "images"), str(tmp_path)
    teacher = ProbeTeacher(weights=None, seed=1, images=source, runs=runs)
    (file,) = tmp_path.glob("probe-*.safetensors")
    written = file.stat().st_mtime_ns
    again = ProbeTeacher(weights=None, seed=1, images=source, runs=runs)
    assert file.stat().st_mtime_ns == written
    images = pictures(24, 16)
    features = teacher(images, 3, 2)
    assert features.shape == (2, 64, 3, 2) and torch.equal(again(images, 3, 2), features)
    assert torch.equal(ProbeTeacher(weights=str(file), seed=1, images=source, runs=runs)(images, 3, 2), features)
    net = Probe.load(file, torch.device("cpu")).net
    full = net.maps(pictures(32, 32) / 127.5 - 1, 3)
    torch.testing.assert_close(teacher(pictures(32, 32), 8, 8), full)
    other = ProbeTeacher(weights=None, seed=0, images=source, runs=runs)
    assert not torch.equal(other(images, 3, 2), features) and len(list(tmp_path.glob("probe-*.safetensors"))) == 2
