from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import nn

from genfound.backbones.dit import DiT, position_table
from genfound.batch import Batch
from genfound.checkpoints.official.dit import from_official, to_official
from genfound.layouts import Dense
from genfound.runtime import checkpoint_io
from tests.helpers import assert_equal_gradients, composed, latents, loss_and_gradients

SMALL_DIT: dict[str, Any] = {
    "channels": 4,
    "num_classes": 10,
    "patch_size": 2,
    "width": 32,
    "depth": 2,
    "heads": 2,
    "mlp_ratio": 4,
    "label_drop": 0.1,
    "learn_sigma": True,
    "unused_half": False,
    "activation_checkpointing": False,
}
TRAINABLE = {
    ("s", 2): 32_865_056, ("s", 4): 32_920_448, ("s", 8): 33_142_016,
    ("b", 2): 130_315_808, ("b", 4): 130_426_496, ("b", 8): 130_869_248,
    ("l", 2): 457_840_672, ("l", 4): 457_988_224, ("l", 8): 458_578_432,
    ("xl", 2): 674_834_720, ("xl", 4): 675_000_704, ("xl", 8): 675_664_640,
}  # fmt: skip
TIMES = torch.tensor([0.0, 417.0, 999.0])


def small_dit(**options: Any) -> DiT:
    """A DiT of two blocks whose weights are all random, also those that start at zero."""
    net = DiT(**{**SMALL_DIT, **options})
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
    return net


def dense(size: tuple[int, int] = (8, 8), count: int = 3, patch_size: int = 2) -> Batch:
    return Dense(patch_size).to_batch(latents([size] * count), torch.arange(count))


@pytest.mark.parametrize(("learn_sigma", "outputs"), [(True, 8), (False, 4)])
@pytest.mark.parametrize("size", [(8, 8), (4, 12), (2, 2)])
def test_output_has_the_size_of_the_latent(size: tuple[int, int], learn_sigma: bool, outputs: int) -> None:
    net = small_dit(learn_sigma=learn_sigma)
    assert net(dense(size), TIMES).shape == (3, outputs, *size)


def test_a_new_network_predicts_zero() -> None:
    assert (DiT(**SMALL_DIT)(dense(), TIMES) == 0).all()


def test_only_the_last_projection_learns_in_the_first_step() -> None:
    net = DiT(**SMALL_DIT)
    (net(dense(), TIMES) - 1).square().mean().backward()
    learning = {name for name, p in net.named_parameters() if p.grad is not None and (p.grad != 0).any()}
    assert learning == {"final_layer.linear.weight", "final_layer.linear.bias"}


@pytest.mark.parametrize(("size", "patch"), TRAINABLE)
def test_published_parameter_counts(size: str, patch: int) -> None:
    options = composed(f"model=dit_{size}", f"model.patch_size={patch}")["model"]
    assert options.pop("_target_") == "genfound.backbones.dit.DiT"
    assert options["learn_sigma"] == "auto"
    with torch.device("meta"):
        net = DiT(**{**options, "channels": 4, "num_classes": 1000, "learn_sigma": True})
    assert sum(p.numel() for p in net.parameters()) == TRAINABLE[size, patch]


def test_a_batch_gives_what_each_image_alone_gives() -> None:
    net, batch = small_dit(), dense()
    together = net(batch, TIMES)
    for i in range(3):
        alone = Dense(2).to_batch([batch.x[i]], batch.y[i : i + 1])
        torch.testing.assert_close(net(alone, TIMES[i : i + 1])[0], together[i], atol=1e-5, rtol=1e-5)


def test_positions_are_columns_then_rows_of_whole_numbers() -> None:
    table = position_table(3, 5, 16)
    for row, column in ((0, 0), (1, 4), (2, 3)):
        k = torch.arange(4, dtype=torch.float64)
        expected = [f(n * 10_000 ** (-k / 4)) for n in (column, row) for f in (torch.sin, torch.cos)]
        torch.testing.assert_close(table[5 * row + column], torch.cat(expected).float(), atol=1e-7, rtol=0)


def test_a_rectangle_is_a_part_of_the_square() -> None:
    """Without blocks nothing mixes tokens, so a crop of the image gives a crop of the output."""
    net = small_dit(depth=0)
    square = dense((8, 8))
    crop = Dense(2).to_batch(list(square.x[..., :4, :6]), square.y)
    torch.testing.assert_close(net(crop, TIMES), net(square, TIMES)[..., :4, :6], atol=1e-6, rtol=1e-6)


def test_time_label_and_position_matter() -> None:
    net = small_dit()
    x = torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(1))
    batch = Dense(2).to_batch([x, x], torch.tensor([1, 1]))
    base = net(batch, torch.tensor([300.0, 300.0]))
    assert torch.equal(base[0], base[1])
    later = net(batch, torch.tensor([300.0, 301.0]))
    other = net(Dense(2).to_batch([x, x], torch.tensor([1, 2])), torch.tensor([300.0, 300.0]))
    same_patches = net(Dense(2).to_batch([torch.ones(4, 4, 4)], batch.y[:1]), torch.tensor([300.0]))
    assert (later[1] - base[1]).abs().max() > 1e-3
    assert (other[1] - base[1]).abs().max() > 1e-3
    assert (same_patches[..., :2, :2] - same_patches[..., 2:, 2:]).abs().max() > 1e-3


def test_whole_and_real_times_are_the_same_times() -> None:
    net, batch = small_dit(), dense()
    assert torch.equal(net(batch, TIMES), net(batch, TIMES.long()))


def test_training_mode_changes_nothing() -> None:
    net, batch = small_dit(), dense()
    assert torch.equal(net.train()(batch, TIMES), net.eval()(batch, TIMES))


def test_activation_checkpointing_gives_equal_gradients() -> None:
    plain, saving = small_dit().train(), small_dit(activation_checkpointing=True).train()
    loss, gradients = loss_and_gradients(plain, dense(), TIMES)
    again, others = loss_and_gradients(saving, dense(), TIMES)
    assert torch.equal(loss, again)
    assert_equal_gradients(others, gradients, 1e-6)
    assert len(gradients) == len(list(plain.parameters()))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_equals_eager(backend: str) -> None:
    eager, compiled = small_dit(depth=1), small_dit(depth=1)
    compiled.compile(fullgraph=True, backend=backend)
    loss, gradients = loss_and_gradients(eager, dense(), TIMES)
    again, others = loss_and_gradients(compiled, dense(), TIMES)
    torch.testing.assert_close(again, loss, rtol=1e-5, atol=0)
    assert_equal_gradients(others, gradients, 1e-4)


def test_bf16_autocast_stays_close_to_fp32() -> None:
    net, batch = small_dit(depth=4), dense()
    exact = net(batch, TIMES)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = net(batch, TIMES)
    assert rounded.dtype == torch.float32
    error = (rounded - exact).norm() / exact.norm()
    assert 1e-4 < error < 0.03


def test_the_null_label_exists_only_with_label_dropout() -> None:
    with_null, without = DiT(**SMALL_DIT), DiT(**{**SMALL_DIT, "label_drop": 0.0})
    assert with_null.null_label == 10
    assert with_null.y_embedder.embedding_table.weight.shape[0] == 11
    assert without.null_label is None
    assert without.y_embedder.embedding_table.weight.shape[0] == 10


@pytest.mark.parametrize(("width", "heads"), [(30, 2), (32, 3)])
def test_a_width_that_does_not_divide_is_refused(width: int, heads: int) -> None:
    with pytest.raises(ValueError, match=rf"model\.width={width} must be a multiple of 4 and of model\.heads={heads}"):
        DiT(**{**SMALL_DIT, "width": width, "heads": heads})


def test_an_undecided_learn_sigma_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.learn_sigma=perhaps is unknown; choose auto, true or false"):
        DiT(**{**SMALL_DIT, "learn_sigma": "perhaps"})


def test_weights_go_out_and_come_in_unchanged() -> None:
    net = small_dit()
    official = to_official(net.state_dict(), 2, (4, 4))
    assert official["x_embedder.proj.weight"].shape == (32, 4, 2, 2)
    assert official["pos_embed"].shape == (1, 16, 32)
    back = from_official(official)
    assert back.keys() == net.state_dict().keys()
    assert all(torch.equal(back[key], value) for key, value in net.state_dict().items())


def test_official_weights_are_a_convolution_and_a_channel_last_patch() -> None:
    net, batch = small_dit(), dense()
    official = to_official(net.state_dict(), 2, (4, 4))
    tokens = nn.functional.conv2d(
        batch.x, official["x_embedder.proj.weight"], official["x_embedder.proj.bias"], stride=2
    )
    ours = net.x_embedder(rearrange(batch.x, "b c (h p) (w q) -> b h w (c p q)", p=2, q=2))
    torch.testing.assert_close(tokens.permute(0, 2, 3, 1), ours, atol=1e-6, rtol=1e-5)
    weight, bias = official["final_layer.linear.weight"], official["final_layer.linear.bias"]
    for row, column, channel in ((0, 1, 5), (1, 0, 2)):
        theirs, mine = (2 * row + column) * 8 + channel, channel * 4 + 2 * row + column
        assert torch.equal(weight[theirs], net.final_layer.linear.weight[mine])
        assert bias[theirs] == net.final_layer.linear.bias[mine]


def test_foreign_weights_are_refused() -> None:
    official = to_official(small_dit().state_dict(), 2, (4, 4))
    with pytest.raises(ValueError, match=r"no convolution x_embedder\.proj\.weight"):
        from_official({key: value for key, value in official.items() if "x_embedder" not in key})
    with pytest.raises(ValueError, match="pos_embed is not DiT's sine-cosine table"):
        from_official({**official, "pos_embed": official["pos_embed"].flip(1)})
    with pytest.raises(ValueError, match="pos_embed is not DiT's sine-cosine table"):
        from_official({**official, "pos_embed": official["pos_embed"][:, :15]})
    with pytest.raises(ValueError, match=r"1 unexpected \(blocks\.0\.attn\.q_norm\.weight\)"):
        extra = from_official({**official, "blocks.0.attn.q_norm.weight": torch.ones(16)})
        checkpoint_io.load_strict(small_dit(), extra, Path("weights.pt"))


def test_an_averaged_position_table_is_accepted() -> None:
    official = to_official(small_dit().state_dict(), 2, (4, 4))
    assert "pos_embed" not in from_official({**official, "pos_embed": official["pos_embed"] * (1 - 1.7e-4)})
    assert "pos_embed" not in from_official({k: v for k, v in official.items() if k != "pos_embed"})
