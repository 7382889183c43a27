"""Autoencoders in LDM's own files; that they compute what they should is shown by the golden cases."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from genfound.data.latents.stored_tokenizer import describe, encoder_digest
from genfound.tokenizers import ldm
from genfound.tokenizers.autoencoder import Autoencoder
from genfound.tokenizers.sd_vae import SDVAE
from genfound.tokenizers.vq_f4 import VQF4
from genfound.tokenizers.vq_f8 import VQF8
from genfound.tokenizers.weights import option_of

OPTIONS: dict[str, Any] = {"precision": "fp32", "pixels_per_call": 2**20}


def ldm_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of diffusers under LDM's names."""
    levels = len({name.split(".")[2] for name in state if name.startswith("encoder.down_blocks.")})
    theirs = {}
    for name in state:
        part = re.sub(r"up_blocks\.(\d+)", lambda found: f"up.{levels - 1 - int(found[1])}", name)
        for ours, other in (
            ("down_blocks", "down"), (".resnets.", ".block."), (".attentions.", ".attn."),
            ("mid_block.block.0", "mid.block_1"), ("mid_block.block.1", "mid.block_2"),
            ("mid_block.attn.0", "mid.attn_1"), (".downsamplers.0", ".downsample"), (".upsamplers.0", ".upsample"),
            ("conv_shortcut", "nin_shortcut"), ("conv_norm_out", "norm_out"),
            ("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out"),
        ):  # fmt: skip
            part = part.replace(ours, other)
        matrix = re.search(r"attn.*(q|k|v|proj_out)\.weight$", part)
        theirs[part] = state[name][..., None, None] if matrix else state[name]
    return theirs


def written(codec: Autoencoder, file: Path, **more: Tensor) -> Path:
    state = {**ldm_names(codec.model.state_dict()), "loss.discriminator.weight": torch.zeros(1), **more}
    if file.suffix == ".safetensors":
        save_file({name: value.contiguous() for name, value in state.items()}, file)
    else:
        torch.save({"state_dict": state}, file)
    return file


KINDS = {"vq_f4": (VQF4, {}), "vq_f8": (VQF8, {}), "sd_vae": (SDVAE, {"posterior": "mode"})}


def build(name: str, weights: str) -> Autoencoder:
    kind, more = KINDS[name]
    return kind(weights=weights, **OPTIONS, **more)


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
@pytest.mark.parametrize("name", KINDS)
def test_a_file_is_the_autoencoder_that_it_was_made_from(name: str, suffix: str, tmp_path: Path) -> None:
    codec = build(name, "random_tiny")
    file = written(codec, tmp_path / f"model{suffix}")
    told = ldm.config_of(ldm.read(file), file)
    assert told.pop("_class_name") == codec.kind.name
    assert told == {key: list(own) if isinstance(own := codec.model.config[key], tuple) else own for key in told}
    ours = ldm.to_diffusers(ldm.read(file), len(told["block_out_channels"]))
    state = codec.model.state_dict()
    assert ours.keys() == state.keys() and all(torch.equal(ours[key], state[key]) for key in state)
    assert option_of(file) == ("sd_vae" if name == "sd_vae" else "vq_f4")


def test_the_scale_is_that_of_the_file_or_the_published_one(tmp_path: Path) -> None:
    codec = wide()
    assert VQF4(weights=str(written(codec, tmp_path / "one.ckpt")), **OPTIONS).scale == 1.0
    scaled = written(codec, tmp_path / "two.ckpt", scale_factor=torch.tensor(0.25))
    assert VQF4(weights=str(scaled), **OPTIONS).scale == 0.25


def wide() -> Autoencoder:
    """A small autoencoder that has 32 groups."""
    import diffusers

    codec = build("vq_f4", "random_tiny")
    small = {**VQF4.kind.official, **VQF4.kind.tiny, "norm_num_groups": 32, "block_out_channels": [32, 32, 32]}
    codec.model = diffusers.VQModel(**small)
    return codec


def test_latents_of_a_file_are_told_from_those_of_another(tmp_path: Path) -> None:
    codec = wide()
    file = written(codec, tmp_path / "one.ckpt")
    state = dict(codec.model.state_dict())
    decoder, encoder = (next(name for name in state if name.startswith(part)) for part in ("decoder.", "encoder."))
    digests = []
    for number, changed in enumerate((None, decoder, encoder)):
        codec.model.load_state_dict({**state, **({} if changed is None else {changed: state[changed] + 1})})
        file = written(codec, tmp_path / f"{number}.ckpt")
        known = describe({"_target_": "genfound.tokenizers.vq_f4.VQF4", "weights": str(file)}, lambda: codec)
        assert (known.folder, known.spec) == (file, (3, 4))
        digests.append(encoder_digest(known))
    assert digests[0] == digests[1] != digests[2]


def test_codes_are_the_nearest_in_units_of_latents(tmp_path: Path) -> None:
    codec = VQF4(weights=str(written(wide(), tmp_path / "x.ckpt", scale_factor=torch.tensor(0.5))), **OPTIONS)
    z = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    book = codec.model.quantize.embedding.weight
    nearest = torch.cdist((z * 2).permute(0, 2, 3, 1).reshape(-1, 3), book).argmin(1)
    expected = 0.5 * book[nearest].view(2, 4, 6, 3).permute(0, 3, 1, 2)
    torch.testing.assert_close(codec.quantise(z), expected)


@pytest.mark.parametrize("kind", ["another class", "no autoencoder", "no names", "cut", "other weights"])
def test_wrong_files_are_named(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "model.ckpt"
    codec = wide()
    state = ldm_names(codec.model.state_dict())
    name, message = "vq_f4", ""
    if kind == "another class":
        written(codec, file)
        name, way = "sd_vae", "describes VQModel; choose tokenizer=vq_f4"
        message = f"tokenizer=sd_vae takes AutoencoderKL, but {file} {way}"
    elif kind == "no autoencoder":
        torch.save({"state_dict": {"encoder.conv_in.weight": torch.zeros(1)}}, file)
        message = f"{file} holds no autoencoder of LDM"
    elif kind == "no names":
        torch.save([torch.zeros(1)], file)
        message = f"{file} holds no autoencoder of LDM"
    elif kind == "cut":
        written(codec, file)
        file.write_bytes(file.read_bytes()[:-5000])
        message = f"{file} is damaged"
    else:
        torch.save({key: value for key, value in state.items() if "decoder.conv_in" not in key}, file)
        message = f"{file} does not fit VQModel"
    with pytest.raises(ValueError, match=re.escape(message)):
        build(name, str(file))
