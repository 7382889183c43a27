"""The options of conf/model/: how much of each is trained, and networks from them without a run."""

from __future__ import annotations

import re

import pytest
import torch

from genfound import build
from genfound.backbones.base import Backbone
from genfound.backbones.dit import DiT
from genfound.backbones.dit_moe import DiTMoE
from genfound.backbones.fit import FiT
from genfound.backbones.nit import NiT
from genfound.backbones.sit import SiT
from genfound.config import compose
from tests.helpers import composed, training_module

TRAINABLE = {
    "dim_h": 862_407_184,
    "dim_h_512": 863_586_832,
    "dim_l": 386_063_376,
    "dim_tiny": 1_276_172,
    "dig_b": 130_551_584,
    "dig_l": 464_760_352,
    "dig_s": 32_983_328,
    "dig_tiny": 1_677_976,
    "dig_xl": 675_659_040,
    "dit_b": 130_315_808,
    "dit_l": 457_840_672,
    "dit_moe_b_8e2a": 795_664_928,
    "dit_moe_g_16e2a": 16_503_370_784,
    "dit_moe_l_8e2a": 2_823_501_856,
    "dit_moe_s_16e2a": 369_115_424,
    "dit_moe_s_8e2a": 199_209_248,
    "dit_moe_tiny": 2_649_368,
    "dit_moe_xl_8e2a": 4_167_877_280,
    "dit_s": 32_865_056,
    "dit_tiny": 1_402_648,
    "dit_xl": 674_834_720,
    "fit_b": 158_664_224,
    "fit_tiny": 1_665_292,
    "fit_xl": 823_599_392,
    "fitv2_3b": 2_971_928_080,
    "fitv2_b": 128_149_072,
    "fitv2_hr_3b": 415_683_856,
    "fitv2_hr_xl": 94_961_680,
    "fitv2_tiny": 1_336_756,
    "fitv2_xl": 671_045_776,
    "jit_b": 131_123_712,
    "jit_h": 952_514_368,
    "jit_l": 458_877_664,
    "jit_tiny": 1_402_772,
    "ldm_4": 400_920_579 + 1001 * 512,
    "ldm_8": 394_984_196 + 1001 * 512,
    "ldm_tiny": 4_196_323,
    "lightningdit_1p0b": 1_029_007_904,
    "lightningdit_1p6b": 1_631_308_368,
    "lightningdit_b": 130_359_584,
    "lightningdit_l": 458_087_520,
    "lightningdit_tiny": 1_402_420,
    "lightningdit_xl": 674_961_824,
    "nit_b": 130_331_168,
    "nit_l": 457_863_200,
    "nit_s": 32_874_272,
    "nit_t2i_tiny": 1_318_924,
    "nit_t2i_xl": 673_214_368,
    "nit_tiny": 1_401_612,
    "nit_xl": 674_861_216,
    "nit_xxl": 1_362_730_016,
    "sit_b": 130_315_808,
    "sit_l": 457_840_672,
    "sit_s": 32_865_056,
    "sit_tiny": 1_402_648,
    "sit_xl": 674_834_720,
}
"""Parameters that a run of an option moves, with 1,000 classes and the latents of its tokenizer."""


@pytest.mark.parametrize("model", TRAINABLE)
def test_how_much_of_a_model_is_trained(model: str) -> None:
    config = composed(f"model={model}")
    with torch.device("meta"):
        net = build.net(config, build.published_spec(config), 1000)
    trained = training_module(net, optimizer=config["optimizer"]).net.parameters()
    assert sum(p.numel() for p in trained if p.requires_grad) == TRAINABLE[model]


def test_every_model_is_counted() -> None:
    files = {
        option for option in compose.option_names("model") if "_" in option and option not in ("dit_moe", "nit_t2i")
    }
    assert files == TRAINABLE.keys()


@pytest.mark.parametrize(
    ("kind", "name"),
    [(DiT, "xl"), (SiT, "b"), (FiT, "b"), (FiT, "fitv2_hr_xl"), (NiT, "xl"), (NiT, "nit_s"), (DiTMoE, "g_16e2a")],
)
def test_a_network_of_a_preset_is_that_of_its_option(kind: type[Backbone], name: str) -> None:
    option = name if name in TRAINABLE else f"{kind.__module__.rpartition('.')[2]}_{name}"
    config = composed(f"model={option}")
    with torch.device("meta"):
        net, same = kind.from_preset(name), build.net(config, build.published_spec(config), 1000)
    shapes, expected = ({key: p.shape for key, p in x.state_dict().items()} for x in (net, same))
    assert type(net) is type(same) is kind and shapes == expected
    assert (net.token_spec, net.time, net.null_label) == (same.token_spec, same.time, 1000)


def test_a_preset_has_the_initial_values_of_a_run_and_takes_other_options() -> None:
    config = composed("model=nit_tiny", "model.depth=1", "seed=3")
    expected = build.net(config, build.published_spec(config), 10).state_dict()
    net = NiT.from_preset("tiny", num_classes=10, seed=3, depth=1)
    assert net.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in net.state_dict().items())
    assert NiT.from_preset("tiny", depth=1, channels=4).token_spec.channels == 4


def test_unknown_presets_and_keys_name_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"^NiT has no preset huge; choose one of b, l, s, tiny, xl, xxl$"):
        NiT.from_preset("huge")
    with pytest.raises(ValueError, match=r"^DiT has no preset nit_xl; choose one of b, l, s, tiny, xl$"):
        DiT.from_preset("nit_xl")
    listed = "b, tiny, xl, fitv2_3b, fitv2_b, fitv2_hr_3b, fitv2_hr_xl, fitv2_tiny, fitv2_xl"
    with pytest.raises(ValueError, match=re.escape(f"FiT has no preset 3b; choose one of {listed}")):
        FiT.from_preset("3b")
    with pytest.raises(ValueError, match=r"^layers is no key of model=tiny; its keys: channels, patch_size, width"):
        NiT.from_preset("tiny", layers=2)


OPERATIONS = {
    "dit_s": (6.056, 0), "dit_b": (23.005, 0), "dit_l": (80.698, 0), "dit_xl": (118.621, 4.23),
    "sit_xl": (118.621, 4.23),
    "fit_xl": (156.67, 4.23), "fitv2_xl": (152.31, 5.44), "fitv2_3b": (664.82, 12.08), "fit_b": (30.25, 1.21),
    "dit_moe_s_8e2a": (16.031, 0.604), "dit_moe_xl_8e2a": (327.967, 4.228), "dit_moe_g_16e2a": (698.327, 7.382),
    "lightningdit_b": (23.008, 0), "lightningdit_xl": (118.626, 0), "lightningdit_1p6b": (283.350, 0),
    "jit_b": (25.2, 0), "jit_l": (87.9, 0), "jit_h": (181.9, 0),
    "dim_l": (139.9, 0), "dim_h": (311.9, 0),
    "dig_s": (5.57, 0), "dig_b": (22.02, 0), "dig_l": (79.69, 0), "dig_xl": (115.20, 0),
    "nit_s": (6.06, 0), "nit_b": (23.0, 0), "nit_l": (80.7, 0), "nit_xl": (118.6, 0), "nit_xxl": (298.2, 0),
}  # fmt: skip
"""10^9 multiply-adds of 256 tokens, as published or counted on the official code, and those of attention among them.

DiT, SiT: paper table 4 and README; DiT-MoE: paper table 1, and FiT, FiTv2: README, both with attention added.
NiT: its advertised number has the modulation of every token, ours that of the image. JiT: paper.
DiG: linear layers and convolutions of the official code, and 2 k v for each token of a head.
DiM: the same, of 366 tokens, and 9 operations for each state.
"""


@pytest.mark.parametrize("model", OPERATIONS)
def test_operations_are_those_that_are_published(model: str) -> None:
    config = composed(f"model={model}")
    with torch.device("meta"):
        net = build.net(config, build.published_spec(config), 1000)
    every, attention = OPERATIONS[model]
    counted = net.flops()
    assert counted.total(1, 256, 256**2) / 2e9 == pytest.approx(every, rel=2e-3)
    if attention:
        assert (counted.total(1, 256, 256**2) - counted.total(1, 256, 0)) / 2e9 == pytest.approx(attention, abs=5e-3)
