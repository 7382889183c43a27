from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from genfound import build
from genfound.backbones.nit import coordinates
from genfound.batch import Batch
from genfound.tokenizers import LatentSpec
from tests.helpers import assert_equal_gradients, composed, fresh_nit, loss_and_gradients, packed, small_nit

SIZES = [(3, 5), (4, 4), (1, 7), (2, 1)]
TIMES = torch.tensor([0.1, 0.5, 0.9, 1.0])
PARAMETERS = {"s": 32_874_272, "b": 130_331_168, "l": 457_863_200, "xl": 674_861_216, "xxl": 1_362_730_016}


def static_pack(sizes: list[tuple[int, int]]) -> tuple[Batch, Tensor]:
    batch = packed(sizes, max_tokens=64, max_images=6, filler_label=10)
    return batch, torch.linspace(0, 1, len(batch.y))


@pytest.mark.parametrize("rope_coords", ["row_major", "official"])
def test_a_pack_gives_what_each_image_alone_gives(rope_coords: str) -> None:
    net = small_nit(rope_coords=rope_coords)
    batch = packed(SIZES)
    together = net(batch, TIMES)
    pieces = batch.x.split(batch.tokens.tolist())
    for i, (piece, out) in enumerate(zip(pieces, together.split(batch.tokens.tolist()), strict=True)):
        alone = replace(packed([SIZES[i]]), x=piece, y=batch.y[i : i + 1])
        torch.testing.assert_close(net(alone, TIMES[i : i + 1]), out, atol=1e-5, rtol=1e-5)


def test_filler_changes_nothing() -> None:
    net = small_nit()
    exact = net(packed(SIZES), TIMES)
    static = packed(SIZES, max_tokens=60, max_images=9, filler_label=10)
    padded = torch.nn.functional.pad(TIMES, (0, 6))
    torch.testing.assert_close(net(static, padded)[: len(exact)], exact, atol=1e-5, rtol=1e-5)


def test_a_new_network_predicts_zero() -> None:
    assert (fresh_nit()(packed(SIZES), TIMES) == 0).all()


@pytest.mark.parametrize(("size", "parameters"), PARAMETERS.items())
def test_published_parameter_counts(size: str, parameters: int) -> None:
    config = composed(f"model=nit_{size}")
    assert config["model"]["_target_"] == "genfound.backbones.nit.NiT"
    assert config["model"]["patch_size"] == 1
    with torch.device("meta"):
        net = build.net(config, LatentSpec(channels=32, stride=32), num_classes=1000)
    assert sum(p.numel() for p in net.parameters()) == parameters


def test_coordinates_of_a_2_by_3_image() -> None:
    batch = packed([(1, 1), (2, 3)])
    assert coordinates(batch, "row_major")[1:].tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    assert coordinates(batch, "official")[1:].tolist() == [[0, 0], [1, 0], [0, 1], [1, 1], [0, 2], [1, 2]]


def test_coordinates_of_square_images_differ_by_a_swap_of_axes_only() -> None:
    batch = packed([(4, 4), (3, 3), (1, 1)])
    assert torch.equal(coordinates(batch, "official"), coordinates(batch, "row_major").flip(1))


def test_static_filler_has_coordinates_too() -> None:
    batch, _ = static_pack([(3, 5)])
    for order in ("row_major", "official"):
        assert coordinates(batch, order).shape == (64, 2)
        assert (coordinates(batch, order) >= 0).all()


def test_the_orders_of_coordinates_differ_on_other_images() -> None:
    ours, official = small_nit(rope_coords="row_major"), small_nit(rope_coords="official")
    batch, t = packed([(3, 5)]), torch.tensor([0.3])
    assert (ours(batch, t) - official(batch, t)).abs().max() > 1e-3


def test_transposed_square_image_gives_the_transposed_result_of_the_other_order() -> None:
    """Swapping the axes of the image and of the head's halves is the official order on a square."""
    batch, t = packed([(4, 4)]), torch.tensor([0.3])
    turned = replace(batch, x=batch.x.view(4, 4, -1).transpose(0, 1).flatten(0, 1))
    ours = small_nit(rope_coords="official")(turned, t).view(4, 4, -1).transpose(0, 1).flatten(0, 1)
    torch.testing.assert_close(ours, small_nit(rope_coords="row_major")(batch, t), atol=1e-5, rtol=1e-5)


def test_time_label_and_position_matter() -> None:
    net = small_nit()
    batch = packed([(3, 4), (3, 4)])
    batch = replace(batch, x=torch.cat([batch.x[:12], batch.x[:12]]), y=torch.tensor([1, 1]))
    base = net(batch, torch.tensor([0.3, 0.3]))
    assert torch.equal(base[:12], base[12:])
    later = net(batch, torch.tensor([0.3, 0.7]))
    other = net(replace(batch, y=torch.tensor([1, 2])), torch.tensor([0.3, 0.3]))
    still = net(replace(batch, x=torch.ones_like(batch.x)), torch.tensor([0.3, 0.3]))
    assert (later[12:] - base[12:]).abs().max() > 1e-3
    assert (other[12:] - base[12:]).abs().max() > 1e-3
    torch.testing.assert_close(still[:1].expand_as(still), still, atol=1e-5, rtol=1e-5)  # values do not know places


@pytest.mark.parametrize(("every", "again"), [(True, [0, 1, 2]), (2, [0, 2])])
def test_activation_checkpointing_gives_equal_gradients(every: bool | int, again: list[int]) -> None:
    plain, saving = small_nit(depth=3), small_nit(depth=3, activation_checkpointing=every)
    batch, t = static_pack(SIZES)
    loss, gradients = loss_and_gradients(plain.train(), batch, t)
    calls: list[int] = []
    for number, block in enumerate(saving.blocks):
        block.mlp.register_forward_pre_hook(lambda *_, number=number: calls.append(number))
    same, others = loss_and_gradients(saving.train(), batch, t)
    assert calls[:3] == [0, 1, 2] and sorted(calls[3:]) == again  # in the backward pass
    assert torch.equal(loss, same)
    assert_equal_gradients(others, gradients, 1e-6)
    assert len(gradients) == len(list(plain.parameters()))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_equals_eager_and_is_compiled_once(backend: str) -> None:
    eager, compiled = small_nit(depth=1), small_nit(depth=1)
    compiled.compile(fullgraph=True, backend=backend)
    packs = [SIZES, [(4, 4), (2, 5), (3, 3)]]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch, t in map(static_pack, packs):
            loss, gradients = loss_and_gradients(eager, batch, t)
            again, others = loss_and_gradients(compiled, batch, t)
            torch.testing.assert_close(again, loss, rtol=1e-5, atol=0)
            assert_equal_gradients(others, gradients, 1e-4)


def test_bf16_autocast_stays_close_to_fp32() -> None:
    net = small_nit(depth=4)
    batch = packed(SIZES)
    exact = net(batch, TIMES)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = net(batch, TIMES)
    assert rounded.dtype == torch.float32
    error = (rounded - exact).norm() / exact.norm()
    assert 1e-4 < error < 0.03


def test_the_null_label_exists_only_with_label_dropout() -> None:
    with_null, without = fresh_nit(), fresh_nit(label_drop=0.0)
    assert with_null.null_label == 10
    assert with_null.y_embedder.embedding_table.weight.shape[0] == 11
    assert without.null_label is None
    assert without.y_embedder.embedding_table.weight.shape[0] == 10


@pytest.mark.parametrize(("width", "heads"), [(30, 2), (36, 2), (32, 5)])
def test_a_head_that_does_not_divide_by_four_is_refused(width: int, heads: int) -> None:
    with pytest.raises(ValueError, match=rf"model\.width={width}.*model\.heads={heads}"):
        fresh_nit(width=width, heads=heads)


def test_unknown_coordinates_are_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.rope_coords=diagonal.*row_major, official"):
        fresh_nit(rope_coords="diagonal")


def test_patches_without_qk_norm_and_with_a_low_rank_modulation() -> None:
    net = small_nit(patch_size=2, qk_norm=False, adaln_rank=8, label_drop=0.0)
    assert not any("norm" in name for name, _ in net.named_parameters())
    per_block = sum(p.numel() for name, p in net.blocks[0].named_parameters() if "adaLN" in name)
    assert per_block == 32 * 8 + 8 + 8 * 192 + 192
    batch = packed([(4, 6), (2, 2)], patch_size=2)
    out = net(batch, torch.tensor([0.2, 0.8]))
    assert out.shape == batch.x.shape == (7, 16)
    alone = net(packed([(4, 6)], patch_size=2), torch.tensor([0.2]))
    torch.testing.assert_close(out[:6], alone, atol=1e-5, rtol=1e-5)


def test_no_rope_table_is_saved() -> None:
    net = fresh_nit()
    assert set(net.state_dict()) == {name for name, _ in net.named_parameters()}
