"""Files of CompVis/latent-diffusion: three networks in one, averages beside them, and what Lightning had put there."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import genfound
from genfound import build
from genfound.backbones.base import Backbone
from genfound.backbones.ldm import LDM
from genfound.checkpoints import convert, initialise
from genfound.checkpoints.official import ldm
from genfound.tokenizers import Undecodable
from genfound.tokenizers import ldm as first_stages
from genfound.tokenizers.vq_f4 import VQF4
from tests.helpers import composed
from tests.tokenizers.test_ldm import ldm_names, wide

OPTIONS = {
    "patch_size": 2, "width": 32, "channel_mult": [1, 2], "depth": 1, "attention_resolutions": [2], "heads": 2,
    "context_width": 24,
}  # fmt: skip


def small(classes: int, **objective: Any) -> tuple[dict[str, Any], Backbone]:
    """Options and a network of two levels."""
    config = composed("model=ldm_4", "experiment=official/ldm")
    config = {**config, "model": {**config["model"], **OPTIONS}, "objective": {**config["objective"], **objective}}
    return config, build.net(config, build.published_spec(config), classes)


def whole(**objective: Any) -> dict[str, Tensor]:
    """A state dict of a small model of seven classes, with a first stage of random weights."""
    config, net = small(7, **objective)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.05)
    first = {f"first_stage_model.{name}": value for name, value in ldm_names(wide().model.state_dict()).items()}
    return ldm.to_official(net.state_dict()) | first | ldm.tables(config, (4, 4))


def save(state: dict[str, Tensor], file: Path) -> Path:
    torch.save({"state_dict": state, "global_step": 7}, file)
    return file


def test_one_file_holds_network_and_tokenizer(tmp_path: Path) -> None:
    state = whole()
    loaded = genfound.load(save(state, tmp_path / "model.ckpt"), num_heads=2)
    assert isinstance(loaded.net, LDM) and loaded.net.null_label == 7 and isinstance(loaded.tokenizer, VQF4)
    assert loaded.tokenizer.spec == (3, 4) and len(loaded.class_names) == 7
    images = genfound.sample(loaded, labels=[1, 2], size=(16, 24), sampler={"name": "ddim", "steps": 2}, guidance=2.0)
    assert images.shape == (2, 16, 24, 3) and images.std() > 0
    with pytest.raises(ValueError, match=r"multiples of 8 pixels .* nearest legal sizes are \[16,16\] and \[16,24\]"):
        genfound.sample(loaded, labels=[1], size=(16, 20))


def test_a_file_goes_there_and_back(tmp_path: Path) -> None:
    state = whole()
    file = save(state, tmp_path / "model.ckpt")
    ours = convert.convert(file, f"{tmp_path}/ours/", None, num_heads=2).file
    back = torch.load(convert.convert(ours, f"{tmp_path}/back.pt", None).file, weights_only=True)["state_dict"]
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)
    assert isinstance(genfound.load(ours).tokenizer, VQF4)


def test_averages_have_names_without_dots_and_leave_out_the_classes(tmp_path: Path) -> None:
    state = whole()
    net = [name for name in state if name.startswith("model.")]
    averages = {f"model_ema.{name.removeprefix('model.').replace('.', '')}": state[name] + 1 for name in net}
    file = save({**state, **averages, "model_ema.decay": torch.tensor(0.9999)}, tmp_path / "model.ckpt")
    ema, raw = (genfound.load(file, weights=weights, num_heads=2).net for weights in ("ema", "raw"))
    for name, p in ema.named_parameters():
        assert torch.allclose(p, raw.get_parameter(name) + (not name.startswith("cond_stage_model.")))


def test_a_table_of_a_thousand_has_no_null_class(tmp_path: Path) -> None:
    state = {name: value for name, value in whole().items() if not name.startswith("first_stage_model.")}
    state["cond_stage_model.embedding.weight"] = torch.randn(1000, 24)
    loaded = genfound.load(save(state, tmp_path / "model.ckpt"), num_heads=2)
    assert loaded.net.null_label is None and len(loaded.class_names) == 1000
    assert isinstance(loaded.tokenizer, Undecodable)


def test_the_tables_tell_the_schedule(tmp_path: Path) -> None:
    asked = {"timesteps": 400, "betas": [0.001, 0.012]}
    loaded = genfound.load(save(whole(**asked), tmp_path / "model.ckpt"), num_heads=2)
    assert loaded.config["objective"]["timesteps"] == 400
    assert loaded.config["objective"]["betas"] == pytest.approx(asked["betas"], rel=1e-6)
    wrong = save({**whole(), "betas": torch.linspace(0.001, 0.02, 1000)}, tmp_path / "wrong.ckpt")
    with pytest.raises(ValueError, match="betas: squares of evenly spaced numbers are expected"):
        genfound.load(wrong, num_heads=2)


def test_other_conditions_are_named(tmp_path: Path) -> None:
    state = whole()
    del state["cond_stage_model.embedding.weight"]
    with pytest.raises(ValueError, match="no classes as its condition"):
        genfound.load(save(state, tmp_path / "model.ckpt"), num_heads=2)


def test_a_class_of_lightning_in_a_file_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "pytorch_lightning.callbacks.model_checkpoint"
    modules = {part: ModuleType(part) for part in ("pytorch_lightning", "pytorch_lightning.callbacks", name)}
    kept = type("ModelCheckpoint", (), {"__module__": name})
    modules[name].ModelCheckpoint = kept  # type: ignore[attr-defined]
    file, state = tmp_path / "model.ckpt", whole()
    with monkeypatch.context() as patch:
        for part, module in modules.items():
            patch.setitem(sys.modules, part, module)
        torch.save({"state_dict": state, "callbacks": {kept: {"best_model_path": "x"}}}, file)
    assert isinstance(genfound.load(file, num_heads=2).tokenizer, VQF4)
    assert name not in sys.modules
    torch.save({"state_dict": state, "callbacks": print}, file)
    for read in (lambda: genfound.load(file, num_heads=2), lambda: first_stages.read(file)):
        with pytest.raises(ValueError, match=re.escape(f"{file} is damaged")):
            read()


def test_a_run_of_other_classes_starts_from_all_but_their_table() -> None:
    (_, few), (_, more) = small(3), small(7)
    assert initialise.other_tables(few.state_dict(), more.state_dict()) == ["cond_stage_model.embedding.weight"]
