from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import genfound
from genfound import build
from genfound.alignment import from_config
from genfound.backbones.ldm import LDM
from genfound.checkpoints.official.ldm import official_options, to_official
from genfound.layouts import Dense
from genfound.rng import Rng
from genfound.tokenizers import LatentSpec
from genfound.tokenizers.vq_f4 import VQF4
from genfound.training import fit
from tests.helpers import ALIGNED, assert_equal_gradients, composed, latents, loss_and_gradients, run_dir

SMALL = {
    "channels": 3, "num_classes": 5, "patch_size": 2, "width": 32, "channel_mult": [1, 2], "depth": 1,
    "attention_resolutions": [2], "heads": 2, "context_width": 24, "learn_sigma": False,
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "cross-attention": {},
    "everywhere": {"attention_resolutions": [1, 2], "depth": 2},
    "three levels": {"channel_mult": [1, 2, 3], "patch_size": 4, "attention_resolutions": [4]},
    "heads of a width": {"head_width": 16},
    "two blocks": {"transformer_depth": 2},
    "time scales": {"scale_shift_norm": True},
    "residual blocks between levels": {"resblock_updown": True},
    "no weights between levels": {"conv_resample": False},
    "added to time": {"conditioning": "embedding"},
    "no class": {"conditioning": "none", "num_classes": 1, "null_class": False, "label_drop": 0.0},
    "learned variance": {"learn_sigma": True},
}


def small(**options: Any) -> LDM:
    """A U-Net of two levels whose weights are all random, also those that start at zero."""
    model = {**composed("model=ldm_4")["model"], **SMALL, **options}
    del model["_target_"]
    net, generator = LDM(**model), torch.Generator().manual_seed(0)
    for name, p in net.named_parameters():
        nn.init.normal_(p, std=0.1, generator=generator)
        if p.ndim == 1 and name.endswith("weight"):
            p.data += 1
    return net.eval()


@torch.no_grad()
def output(net: LDM, y: int = 1, t: float = 500.0, size: tuple[int, int] = (8, 12)) -> Tensor:
    channels, side = net.token_spec
    batch = Dense(side).to_batch(latents([size] * 2, channels), torch.tensor([y, 0]))
    return net(batch, torch.tensor([t, 3.0]))


WITHOUT_CLASS = {"conditioning": "none", "label_drop": 0.0}


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_tell_how_a_network_is_built(variant: str) -> None:
    options = {**SMALL, **VARIANTS[variant]}
    net = small(**VARIANTS[variant])
    told = official_options(to_official(net.state_dict()))
    untold = {"heads", "head_width", "label_drop", *({"context_width"} if "conditioning" in VARIANTS[variant] else ())}
    assert {key: value for key, value in options.items() if key not in untold}.items() <= told.items()
    out = output(net)
    assert out.shape == (2, 6 if variant == "learned variance" else 3, 8, 12)
    assert (output(net, y=2) - out)[0].abs().max() > 1e-3 or variant == "no class"
    assert (output(net, t=20.0) - out)[0].abs().max() > 1e-3


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({}, {"heads": 1}),
        ({}, {"head_width": 8}),
        (WITHOUT_CLASS, {**WITHOUT_CLASS, "attention_order": "kinds"}),
        (WITHOUT_CLASS, {**WITHOUT_CLASS, "heads": 1}),
    ],
)
def test_what_weights_do_not_tell_changes_the_output(one: dict[str, Any], other: dict[str, Any]) -> None:
    a, b = small(**one), small(**other)
    b.load_state_dict(a.state_dict())
    assert (output(a) - output(b)).abs().max() > 1e-4


@pytest.mark.parametrize(("model", "multiply_adds"), [("ldm_4", 104.22), ("ldm_8", 57.04)])
def test_operations_at_256_pixels_are_those_of_the_official_code(model: str, multiply_adds: float) -> None:
    config = composed(f"model={model}")
    with torch.device("meta"):
        counted = build.net(config, build.published_spec(config), 1000).flops()
    assert counted.total(1, 64, 64**2) / 2e9 == pytest.approx(multiply_adds, rel=1e-4)


@pytest.mark.parametrize("options", [{}, WITHOUT_CLASS, {"resblock_updown": True}, {"conv_resample": False}])
def test_operations_are_those_that_run(options: dict[str, Any]) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    net = small(**options)
    batch = Dense(2).to_batch(latents([(8, 12)], 3), torch.tensor([1]))
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        net(batch, torch.tensor([3.0]))
    assert net.flops().total(1, 24, 24**2) == counter.get_total_flops()


def test_an_image_does_not_depend_on_the_others_and_the_null_label_is_a_row() -> None:
    net = small()
    assert net.null_label == 5 and len(net.cond_stage_model.embedding.weight) == 6
    assert small(null_class=False, label_drop=0.0).null_label is None
    torch.testing.assert_close(output(net, y=1)[1], output(net, y=4)[1])


def test_initial_values_are_pytorchs_own_and_zeros() -> None:
    net = small()
    net.initialise(Rng(3))
    assert not output(net).any()
    for name, p in net.named_parameters():
        if name.endswith(("proj_out.weight", "out_layers.3.weight", "out.2.weight")):
            assert not p.any(), name
        elif name == "cond_stage_model.embedding.weight":
            assert p.std().item() == pytest.approx(1, abs=0.15)
        elif p.ndim > 1:
            bound = p[0].numel() ** -0.5
            assert 0.95 * bound < p.abs().max() <= bound, name


def test_recomputed_blocks_have_the_same_gradients() -> None:
    batch, t = Dense(2).to_batch(latents([(4, 8)] * 2, 3), torch.tensor([1, 2])), torch.tensor([3.0, 900.0])
    nets = [small(activation_checkpointing=every).train() for every in (False, True, 2)]
    found = [loss_and_gradients(net, batch, t)[1] for net in nets]
    for other in found[1:]:
        assert_equal_gradients(other, found[0], 1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channel_mult": None}, r"model\.channel_mult=None must be whole numbers of at least 1, such as \[1,2,4\]"),
        ({"attention_resolutions": [0]}, r"model\.attention_resolutions=\[0\] must be whole numbers of at least 1"),
        ({"patch_size": 4}, r"model\.channel_mult=\[1, 2\] has 2 levels; set model\.patch_size=2"),
        ({"width": 40}, r"model\.width=40 must be a multiple of 32"),
        ({"null_class": False}, r"model\.label_drop=0\.1 needs model\.null_class=true"),
        (
            {"conditioning": "text"},
            r"model\.conditioning=text is unknown; choose one of cross_attention, embedding",
        ),
        ({"attention_order": "rows"}, r"model\.attention_order=rows is unknown; choose one of heads, kinds"),
        ({"conditioning": "none"}, r"model\.label_drop=0\.1 needs model\.conditioning=embedding"),
        (
            {"attention_resolutions": [16, 8]},
            r"model\.attention_resolutions=\[16, 8\]: no level is 8 times smaller; choose among 1, 2",
        ),
        ({"heads": 5}, r"model\.heads=5 does not divide the 64 channels of a level"),
        ({"head_width": 24}, r"model\.head_width=24 does not divide the 64 channels of a level"),
        ({"transformer_depth": 0}, r"model\.transformer_depth=0 must be a whole number"),
        ({"learn_sigma": "yes"}, r"model\.learn_sigma=yes is unknown"),
    ],
)
def test_values_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_sides_are_multiples_of_the_coarsest_place() -> None:
    with pytest.raises(ValueError, match=r"\(8, 9\) does not divide into patches of model\.patch_size=2"):
        output(small(), size=(8, 9))


def test_feature_maps_are_not_aligned() -> None:
    config = composed("model=ldm_tiny", *ALIGNED)
    net = build.net(config, LatentSpec(3, 1), 10)
    with pytest.raises(ValueError, match=r"^alignment: the blocks of LDM have feature maps, not tokens; choose align"):
        from_config.alignment(config, net)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@torch._dynamo.config.patch(recompile_limit=2)
def test_every_block_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there are more kinds of blocks than graphs of one function are allowed to be otherwise."""
    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: original(function, backend="aot_eager"))
    net, batch, t = small().train(), Dense(2).to_batch(latents([(4, 8)], 3), torch.tensor([1])), torch.tensor([3.0])
    eager, expected = loss_and_gradients(net, batch, t)
    net.compile_blocks()
    counters.clear()
    for _ in range(2):
        compiled, found = loss_and_gradients(net, batch, t)
    stats: Counter[str] = counters["stats"]
    assert 2 < stats["unique_graphs"] <= len(net.blocks) and not counters["graph_break"]
    torch.testing.assert_close(compiled, eager)
    most = max(float(gradient.abs().max()) for gradient in expected.values())  # those of biases before a norm are noise
    assert all((found[name] - gradient).abs().max() < 1e-5 * most for name, gradient in expected.items())


def test_it_trains_on_latents_of_an_autoencoder_with_a_codebook_and_samples(tmp_path: Path) -> None:
    """Encoded as they are trained, and decoded by the nearest codes."""
    few = ["tokenizer=vq_f4", "tokenizer.weights=random_tiny", "data.sides=[32]", "data.size=32", "trainer.max_steps=2"]
    quiet = ["logger=jsonl", "callbacks.preview=null", "callbacks.validation.images=8", "data.num_workers=0"]
    run = run_dir(tmp_path, "model=ldm_tiny", *few, *quiet)
    fit(run)
    loaded = genfound.load(run)
    images = genfound.sample(loaded, labels=["moon", "ring"], size=(32, 48), sampler={"name": "ddim_ldm", "steps": 2})
    assert isinstance(loaded.tokenizer, VQF4) and images.shape == (2, 32, 48, 3)
    assert len(np.unique(images)) > 2
