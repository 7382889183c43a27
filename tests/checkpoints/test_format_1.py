"""Runs and files of format 1: read under today's names, and not continued."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
from omegaconf import OmegaConf

import genfound
from genfound import build
from genfound.checkpoints import format_1
from genfound.runtime import run_directory
from genfound.tokenizers import PixelTokenizer
from tests.helpers import composed, run_dir

BEFORE = {
    r"^x_embedder\.proj\.": "x_embedder.", r"^t_embedder\.mlp\.0\.": "t_embedder.first.",
    r"^t_embedder\.mlp\.2\.": "t_embedder.second.",
}  # fmt: skip
MLP = {r"\.mlp\.fc1\.": ".mlp.0.", r"\.mlp\.fc2\.": ".mlp.2."}
EXPERTS = {
    r"\.moe\.gate\.": ".mlp.router.", r"\.moe\.experts\.": ".mlp.experts.", r"\.moe\.shared_experts\.gate_proj\.":
    ".mlp.shared.fc1_g.", r"\.moe\.shared_experts\.up_proj\.": ".mlp.shared.fc1_x.",
    r"\.moe\.shared_experts\.down_proj\.": ".mlp.shared.fc2.", r"\.Wqkv\.": ".qkv.", r"\.out_proj\.": ".proj.",
}  # fmt: skip
FAMILIES = {
    "dit": ([], MLP | {r"adaLN_modulation\.1\.": "adaln."}),
    "sit": ([], MLP | {r"adaLN_modulation\.1\.": "adaln."}),
    "fit": ([], {"adaLN_modulation": "adaln"}),
    "fitv2": (["model.adaln_rank=8"], {"adaLN_modulation": "adaln"}),
    "nit": (["model.adaln_rank=8"], MLP | {
        r"final_layer\.adaLN_modulation\.1\.": "final_layer.adaln.", r"adaLN_modulation\.1\.": "adaln.0.",
        r"adaLN_modulation\.2\.": "adaln.1.",
    }),
    "dit_moe": (["model.qk_norm=layernorm"], EXPERTS | {r"adaLN_modulation\.1\.": "adaln."}),
}  # fmt: skip
"""Family -> options, and what its parameters were called."""


def as_before(name: str, patterns: dict[str, str]) -> str:
    for pattern, old in (BEFORE | patterns).items():
        name = re.sub(pattern, old, name)
    return name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_of_format_1_is_read_under_todays_names(family: str, tmp_path: Path) -> None:
    options, patterns = FAMILIES[family]
    config = composed(f"model={family}_tiny", "model.width=32", "model.depth=2", "model.heads=2", *options)
    net = build.net(config, PixelTokenizer().spec, 3)
    config["tokenizer"]["_target_"] = "genfound.tokenizers.pixel.Pixel"
    config["data"]["_target_"] = "genfound.data.shapes.Shapes"
    note = {"config": config, "class_names": ["a", "b", "c"], "sizes": [(16, 16)]}
    old = {as_before(name, patterns): tensor for name, tensor in net.state_dict().items()}
    assert not old.keys() & {"x_embedder.proj.weight", "t_embedder.mlp.0.weight"}
    safetensors.torch.save_file(old, tmp_path / "old.safetensors", {"genfound": json.dumps(note)})
    found = genfound.load(tmp_path / "old.safetensors")
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in found.net.state_dict().items())
    assert found.config["data"]["_target_"] == "genfound.data.images.shapes.Shapes"


def test_a_run_says_its_format_and_another_is_not_continued(tmp_path: Path) -> None:
    run = run_dir(tmp_path / "run")
    file = run / "config.yaml"
    config = OmegaConf.load(file)
    assert config.format == run_directory.FORMAT == 2
    del config["format"]
    OmegaConf.save(config, file)
    (run / "DONE").write_text("{}")
    with pytest.raises(ValueError, match=r"can be loaded but not continued; choose another name=... \(init_from="):
        run_dir(run)


def test_data_that_chose_latents_by_a_hidden_key_are_an_option_of_their_own() -> None:
    data = {"_target_": "genfound.data.image_tree.ImageTree", "source": "store", "root": "latents"}
    assert format_1.config({"data": data})["data"] == {
        "_target_": "genfound.data.latents.store.Store",
        "root": "latents",
    }
    images = format_1.config({"data": data | {"source": "images"}})["data"]
    assert images == {"_target_": "genfound.data.images.imagenet.ImageTree", "root": "latents"}
