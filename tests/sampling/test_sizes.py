"""Parameter counts of every named size, as measured on the official code, in one table."""

from pathlib import Path

import pytest
import torch

from genfound import build
from genfound.config import compose
from tests.helpers import composed

TABLE = {  # the official count, of which the fixed position table is no parameter here
    "dit_s": 32_963_360, "dit_s patch 4": 32_945_024, "dit_s patch 8": 33_148_160,
    "dit_b": 130_512_416, "dit_b patch 4": 130_475_648, "dit_b patch 8": 130_881_536,
    "dit_l": 458_102_816, "dit_l patch 4": 458_053_760, "dit_l patch 8": 458_594_816,
    "dit_xl": 675_129_632, "dit_xl patch 4": 675_074_432, "dit_xl patch 8": 675_683_072,
    "sit_s": 32_963_360, "sit_b": 130_512_416, "sit_l": 458_102_816, "sit_xl": 675_129_632,
    "fit_b": 158_664_224, "fit_xl": 823_599_392,
    "fitv2_b": 128_149_072, "fitv2_xl": 671_045_776, "fitv2_3b": 2_971_928_080,
    "fitv2_hr_xl": 671_045_776, "fitv2_hr_3b": 2_971_928_080,
    "nit_s": 32_874_272, "nit_b": 130_331_168, "nit_l": 457_863_200, "nit_xl": 674_861_216, "nit_xxl": 1_362_730_016,
    "nit_t2i_xl": 673_214_368,  # 673 M in the paper
    "dit_moe_s_8e2a": 199_307_552, "dit_moe_s_16e2a": 369_213_728, "dit_moe_b_8e2a": 795_861_536,
    "lightningdit_b": 130_556_192, "lightningdit_b patch 2": 130_556_288, "lightningdit_l": 458_153_056,
    "lightningdit_xl": 675_256_736, "lightningdit_xl patch 2": 675_256_832,
    "lightningdit_1p0b": 1_029_401_120, "lightningdit_1p0b patch 2": 1_029_401_216,
    "lightningdit_1p6b": 1_631_767_120, "lightningdit_1p6b patch 2": 1_631_767_216,
    "dim_l": 386_063_376, "dim_h": 862_407_184, "dim_h_512": 863_586_832,
    "dig_s": 33_081_632, "dig_b": 130_748_192, "dig_l": 465_022_496, "dig_xl": 675_953_952,
    "ldm_4": 400_920_579 + 1001 * 512, "ldm_8": 394_984_196 + 1001 * 512,  # the U-Net and the table of classes
    "jit_b": 131_320_320, "jit_l": 459_139_808, "jit_h": 952_842_048,
    "dit_moe_l_8e2a": 2_823_764_000, "dit_moe_xl_8e2a": 4_168_172_192, "dit_moe_g_16e2a": 16_503_731_232,
}  # fmt: skip
IMAGENET = 1000
LATENT = {"lightningdit": 16, "jit": 256}
"""Sides of published latents, other than 32, by family."""


def count(name: str, patch: int) -> int:
    config = composed(f"model={name}", *([f"model.patch_size={patch}"] if patch else []))
    with torch.device("meta"):
        net = build.net(config, build.published_spec(config), IMAGENET)
    side = LATENT.get(name.partition("_")[0], 32)
    positions = (side // net.token_spec.patch_size) ** 2 * config["model"]["width"]
    tabled = name.startswith(("dit", "sit", "lightningdit", "jit", "dig"))
    return sum(p.numel() for p in net.parameters()) + (positions if tabled else 0)


@pytest.mark.slow
def test_every_named_size_has_the_published_count() -> None:
    counts = {}
    for row in TABLE:
        name, _, patch = row.partition(" patch ")
        counts[row] = count(name, int(patch or 0))
    assert counts == TABLE


def test_the_table_names_every_size() -> None:
    files = (Path(compose.config_dir()) / "model").glob("*.yaml")
    sizes = {file.stem for file in files if "???" not in file.read_text() and not file.stem.endswith("_tiny")}
    assert sizes == {row.partition(" ")[0] for row in TABLE}
