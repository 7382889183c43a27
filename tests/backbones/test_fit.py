from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from genfound import build
from genfound.backbones.fit import FiT
from genfound.checkpoints.official.fit import (
    from_official,
    official_options,
)
from genfound.layers.tokens import coordinates
from genfound.layouts import Dense, Layout, Packed, Padded
from genfound.runtime import checkpoint_io
from genfound.tokenizers import LatentSpec
from tests.helpers import assert_equal_gradients, composed, latents, loss_and_gradients

SIZES = [(6, 10), (8, 8), (2, 14), (4, 2)]
TIMES = torch.tensor([0.1, 0.5, 0.9, 1.0])
SMALL = {"width": 32, "depth": 2, "heads": 2, "attention": "loop", "learn_sigma": False}
V1 = {"ffn": "swiglu_large", "q_norm": "none", "k_norm": "none", "adaln": "normal", "adaln_rank": None}
PARAMETERS = {
    "fit_b": 158_664_224, "fit_xl": 823_599_392, "fitv2_b": 128_149_072, "fitv2_xl": 671_045_776,
    "fitv2_3b": 2_971_928_080, "fitv2_hr_xl": 671_045_776, "fitv2_hr_3b": 2_971_928_080,
}  # fmt: skip
NETWORKS: list[dict[str, Any]] = [
    {},
    {**V1, "learn_sigma": True, "time": "index"},
    {"ffn": "mlp", "qkv_bias": False, "ffn_bias": False, "mlp_ratio": 3},
    {"norm": "w_layernorm", "q_norm": "w_layernorm", "k_norm": "w_layernorm"},
    {"adaln": "swiglu", "adaln_rank": None, "ffn": "swiglu_large", "mlp_ratio": 2.7, "channels": 3, "patch_size": 1},
]


def fresh_fit(**options: Any) -> FiT:
    """A FiTv2 of two small blocks, or of other options, as it is initialised."""
    model = {
        **composed("model=fitv2_b")["model"],
        **SMALL,
        "adaln_rank": 8,
        "channels": 4,
        "num_classes": 10,
        **options,
    }
    assert model.pop("_target_") == "genfound.backbones.fit.FiT"
    torch.manual_seed(0)
    return FiT(**model)


def small_fit(**options: Any) -> FiT:
    """The same with weights that are all random, also those that start at zero."""
    net, generator = fresh_fit(**options), torch.Generator().manual_seed(0)
    for name, parameter in net.named_parameters():
        nn.init.normal_(parameter, std=0.15, generator=generator)
        if "norm" in name:
            parameter.data += 1
    return net


def layouts(square: bool = False) -> list[Layout]:
    static = Packed(2, max_tokens=80, max_images=6, filler_label=10)
    return [Padded(2), Padded(2, 40), Packed(2), static, *([Dense(2)] if square else [])]


def images(net: FiT, layout: Layout, z: list[Tensor], t: Tensor) -> list[Tensor]:
    """The network's output for each latent, with its first C channels where it has 2 C."""
    batch = layout.to_batch(z, torch.arange(len(z)))
    out = net(batch, nn.functional.pad(t, (0, len(batch.y) - len(t))))
    assert out.shape[-1 if layout.name != "dense" else 1] == batch.x.shape[-1 if layout.name != "dense" else 1]
    return layout.to_latents(out, batch)


SCALINGS = {
    "normal": {},
    "each image's own": {"rule": "ntk-aware-pro2", "trained": 2},
    "one target": {"rule": "yarn", "trained": 2, "target": [5, 9], "decouple": False},
}


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("square", [False, True])
def test_all_layouts_agree(scaling: str, square: bool) -> None:
    rope = {**composed("model=fitv2_b")["model"]["rope_scaling"], **SCALINGS[scaling]}
    net = small_fit(rope_scaling=rope, rope_on_values=True)
    z = latents([(8, 8)] * 3 if square else SIZES)
    first, *others = [images(net, layout, z, TIMES[: len(z)]) for layout in layouts(square)]
    alone = [images(net, Packed(2), [z[i]], TIMES[i : i + 1])[0] for i in range(1)]
    torch.testing.assert_close(alone[0], first[0], atol=1e-5, rtol=1e-5)
    for other in others:
        for ours, expected in zip(other, first, strict=True):
            torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", NETWORKS[1:4])
def test_layouts_agree_for_other_networks(options: dict[str, Any]) -> None:
    net, z = small_fit(**{**options, "learn_sigma": False}), latents(SIZES)
    first, *others = [images(net, layout, z, TIMES) for layout in layouts()]
    for other in others:
        for ours, expected in zip(other, first, strict=True):
            torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_layouts_agree_in_bf16_within_its_rounding() -> None:
    net, z = small_fit(), latents([(8, 8)] * 3)
    exact = torch.stack(images(net, Padded(2), z, TIMES[:3]))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = [torch.stack(images(net, layout, z, TIMES[:3])) for layout in layouts(square=True)]
    for out in rounded:
        assert out.dtype == torch.float32
        assert (out - exact).norm() < 0.03 * exact.norm()
        assert (out - rounded[0]).norm() < 0.01 * exact.norm()
    assert (rounded[0] - exact).norm() > 1e-4 * exact.norm()


def test_padding_may_hold_any_number_and_comes_out_as_zero() -> None:
    net = small_fit()
    batch = Padded(2, 40).to_batch(latents(SIZES), torch.arange(4))
    assert batch.mask is not None
    loud = replace(batch, x=torch.where(batch.mask[..., None], batch.x, torch.full_like(batch.x, 1e4)))
    out = net(batch, TIMES)
    assert (net(loud, TIMES)[~batch.mask] == 0).all()
    assert torch.equal(net(loud, TIMES), out)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_equals_eager_and_is_compiled_once(backend: str, layout: str) -> None:
    eager, compiled = small_fit(depth=1), small_fit(depth=1)
    compiled.compile(fullgraph=True, backend=backend)
    static = {"padded": Padded(2, 40), "packed": Packed(2, max_tokens=80, max_images=4, filler_label=10)}[layout]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for sizes in (SIZES, [(8, 8), (4, 10), (6, 6), (2, 2)]):
            batch = static.to_batch(latents(sizes), torch.arange(4))
            t = torch.linspace(0, 1, len(batch.y))
            loss, gradients = loss_and_gradients(eager, batch, t)
            again, others = loss_and_gradients(compiled, batch, t)
            torch.testing.assert_close(again, loss, rtol=1e-5, atol=0)
            assert_equal_gradients(others, gradients, 1e-4)


def test_activation_checkpointing_gives_equal_gradients() -> None:
    plain, saving = small_fit(), small_fit(activation_checkpointing=True)
    batch = Padded(2).to_batch(latents(SIZES), torch.arange(4))
    loss, gradients = loss_and_gradients(plain.train(), batch, TIMES)
    calls: list[int] = []
    for block in saving.blocks:
        block.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    again, others = loss_and_gradients(saving.train(), batch, TIMES)
    assert len(calls) == 2 * len(saving.blocks)
    assert torch.equal(loss, again)
    assert_equal_gradients(others, gradients, 1e-6)
    assert len(gradients) == len(list(plain.parameters()))


@pytest.mark.parametrize("options", NETWORKS)
def test_a_new_network_predicts_zero_and_only_its_last_layer_learns_at_first(options: dict[str, Any]) -> None:
    net = fresh_fit(**options)
    patch = net.token_spec.patch_size
    batch = Padded(patch).to_batch(latents([(4, 6)], net.token_spec.channels), torch.zeros(1).long())
    out = net(batch, torch.ones(1))
    assert out.shape[-1] == batch.x.shape[-1] * (2 if options.get("learn_sigma") else 1)
    assert (out == 0).all()
    (out - 1).square().mean().backward()
    learning = {name for name, p in net.named_parameters() if p.grad is not None and (p.grad != 0).any()}
    assert learning == {"final_layer.linear.weight", "final_layer.linear.bias"}


@pytest.mark.parametrize("model", PARAMETERS)
def test_published_parameter_counts(model: str) -> None:
    config = composed(f"model={model}")
    with torch.device("meta"):
        net = build.net(config, LatentSpec(channels=4, stride=8), num_classes=1000)
    assert sum(p.numel() for p in net.parameters()) == PARAMETERS[model]
    parts = config["optimizer"]["trainable"] or [""]
    trained = [p.numel() for name, p in net.named_parameters() if any(part in name for part in parts)]
    assert sum(trained) == {"fitv2_hr_xl": 94_961_680, "fitv2_hr_3b": 415_683_856}.get(model, PARAMETERS[model])
    assert net.time == ("data1" if "v2" in model else "index")


def test_time_label_and_position_matter() -> None:
    z = latents([(6, 8)])[0]
    batch = Padded(2).to_batch([z, z], torch.tensor([1, 1]))
    for positions in ("rope", "none"):
        net = small_fit(positions=positions)
        base = net(batch, torch.tensor([0.3, 0.3]))
        assert torch.equal(base[0], base[1])
        later = net(batch, torch.tensor([0.3, 0.7]))
        other = net(replace(batch, y=torch.tensor([1, 2])), torch.tensor([0.3, 0.3]))
        turned = net(replace(batch, x=batch.x.flip(1)), torch.tensor([0.3, 0.3])).flip(1)
        assert (later[1] - base[1]).abs().max() > 1e-3
        assert (other[1] - base[1]).abs().max() > 1e-3
        assert ((turned - base).abs().max() > 1e-3) == (positions == "rope")


def test_time_shifting_and_the_released_clamp() -> None:
    batch = Padded(2).to_batch(latents([(4, 4)] * 2), torch.zeros(2).long())
    plain, shifted, clamped = small_fit(), small_fit(time_shifting=3), small_fit(clamp_time=True)
    torch.testing.assert_close(shifted(batch, torch.tensor([0.0, 0.25])), plain(batch, torch.tensor([0.0, 0.5])))
    steps, ones = torch.tensor([7, 999]), torch.ones(2)
    assert torch.equal(clamped(batch, steps), plain(batch, ones))
    assert (plain(batch, steps) - plain(batch, ones)).abs().max() > 1e-3


def test_the_rule_of_positions_can_be_changed_after_training() -> None:
    net = small_fit()
    before = copy.deepcopy(net.state_dict())
    small, large = latents([(8, 8)]), latents([(40, 8)])
    plain = [images(net, Padded(2), z, TIMES[:1])[0] for z in (small, large)]
    net.rope = replace(net.rope, rule="ntk-aware", trained=16)
    stretched = [images(net, Padded(2), z, TIMES[:1])[0] for z in (small, large)]
    torch.testing.assert_close(stretched[0], plain[0], atol=1e-6, rtol=0)
    assert (stretched[1] - plain[1]).abs().max() > 1e-4
    assert set(before) == set(net.state_dict()) == {name for name, _ in net.named_parameters()}


def test_coordinates_in_all_layouts() -> None:
    batch = Packed(2).to_batch(latents([(2, 2), (4, 6)]), torch.arange(2))
    numbered = [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    assert coordinates(batch, 2)[1:].tolist() == numbered
    batch = Padded(2).to_batch(latents([(2, 2), (4, 6)]), torch.arange(2))
    assert coordinates(batch, 2)[1].tolist() == numbered
    assert coordinates(Dense(2).to_batch(latents([(4, 6)] * 2), torch.arange(2)), 2).tolist() == [numbered]


@pytest.mark.parametrize("options", NETWORKS)
def test_official_weights_tell_their_options(options: dict[str, Any]) -> None:
    net = small_fit(**options)
    told = official_options(net.state_dict())
    assert (told["width"], told["depth"], told["num_classes"]) == (32, 2, 10)
    for key in ("ffn", "norm", "q_norm", "k_norm", "qkv_bias", "ffn_bias", "adaln", "adaln_rank", "learn_sigma"):
        if key in options and options[key] not in ("none", "layernorm"):
            assert told[key] == options[key]
    again = fresh_fit(**{**options, **told})
    checkpoint_io.load_strict(again, net.state_dict(), Path("weights"))


@pytest.mark.parametrize(("ratio", "kind"), [(4, "swiglu"), (4, "swiglu_large"), (4, "mlp"), (1.3, "swiglu_large")])
def test_the_hidden_size_is_told_for_any_width(ratio: float, kind: str) -> None:
    for width in (24, 40, 56):
        state = fresh_fit(width=width, ffn=kind, mlp_ratio=ratio, depth=1).state_dict()
        told = official_options(state)
        assert told["ffn"] == kind
        assert told["mlp_ratio"] == ratio or int(told["mlp_ratio"] * width) == int(ratio * width)
        assert fresh_fit(**{**told, "heads": 2}).state_dict().keys() == state.keys()


def test_foreign_weights_are_refused() -> None:
    official = small_fit().state_dict()
    with pytest.raises(ValueError, match=r"no matrix x_embedder\.proj\.weight"):
        from_official({**official, "x_embedder.proj.weight": torch.zeros(32, 4, 2, 2)})
    with pytest.raises(ValueError, match=r"1 unexpected \(pos_embed\)"):
        checkpoint_io.load_strict(
            small_fit(), from_official({**official, "pos_embed": torch.ones(1)}), Path("weights.pt")
        )


def test_partial_finetuning_trains_what_its_names_say() -> None:
    net, parts = fresh_fit(q_norm="w_layernorm"), composed("model=fitv2_hr_xl")["optimizer"]["trainable"]
    trained = {name for name in net.state_dict() if any(part in name for part in parts)}
    assert {"global_adaLN_modulation.1.weight", "blocks.1.adaLN_modulation.2.weight"} < trained
    assert {"x_embedder.proj.weight", "blocks.0.mlp.fc2.bias"} < trained
    assert not {"blocks.0.mlp.fc2.weight", "y_embedder.embedding_table.weight", "blocks.0.attn.q_norm.weight"} & trained


def test_the_null_label_exists_only_with_label_dropout() -> None:
    with_null, without = fresh_fit(), fresh_fit(label_drop=0.0)
    assert (with_null.null_label, without.null_label) == (10, None)
    assert len(with_null.y_embedder.embedding_table.weight) == 11
    assert len(without.y_embedder.embedding_table.weight) == 10


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"width": 36}, r"model\.width=36.*model\.heads=2"),
        ({"time": "data0"}, r"model\.time=data0 is unknown; choose one of index, data1"),
        ({"positions": "learned"}, r"model\.positions=learned is unknown; choose one of rope, none"),
        ({"adaln": "swin"}, r"model\.adaln=swin is unknown; choose one of normal, lora, swiglu"),
        ({"adaln_rank": None}, r"model\.adaln=lora with model\.adaln_rank=None: lora needs a rank"),
        ({"adaln": "normal"}, r"model\.adaln=normal with model\.adaln_rank=8: lora needs a rank"),
        ({"ffn": "relu"}, r"model\.ffn=relu is unknown"),
        ({"k_norm": "batch"}, r"model\.k_norm=batch is unknown"),
        ({"rope_scaling": {}}, r"model\.rope_scaling=\{\} must have the keys decouple, exact"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fresh_fit(**options)
