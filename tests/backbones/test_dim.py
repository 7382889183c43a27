"""DiM: the same in both layouts, each option in the network, its tokens, and larger images from smaller ones."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from genfound import build
from genfound.backbones.dim import DiM, resized, scan_orders
from genfound.batch import Batch
from genfound.layers.frames import Frame, Framed
from genfound.layers.scans import ORDERS
from genfound.layouts import Dense, Packed
from genfound.modules.base import module_class
from genfound.modules.dim import DiMModule
from genfound.tokenizers import LatentSpec
from tests.helpers import assert_equal_gradients, composed, latents, loss_and_gradients, packed, training_module

SMALL: dict[str, Any] = {"width": 32, "depth": 7, "table": [4, 4], "states": 4}
TIMES = torch.tensor([10.0, 600.0])
SIZES = [(6, 10), (8, 8), (2, 14), (8, 2)]
STATIC = Packed(2, max_tokens=90, max_images=6, filler_label=10)


def fresh(**options: Any) -> DiM:
    """Seven small blocks as they are initialised."""
    config = composed("model=dim_l")
    net = build.net({**config, "model": {**config["model"], **SMALL, **options}}, LatentSpec(4, 8), 10)
    assert isinstance(net, DiM)
    return net.eval()


def small(**options: Any) -> DiM:
    """The same with other positions, which begin at 0."""
    net = fresh(**options)
    nn.init.normal_(net.additional_embed, generator=torch.Generator().manual_seed(0))
    return net


def images(side: int = 8) -> Batch:
    return Dense(2).to_batch(latents([(side, side)] * 2), torch.tensor([1, 2]))


def output(net: DiM, batch: Batch) -> Tensor:
    with torch.no_grad():
        return net(batch, times(batch))


def times(batch: Batch) -> Tensor:
    """Another one for every image."""
    return TIMES if len(batch.y) == 2 else 900 / (1 + torch.arange(len(batch.y)))


PACKS: list[dict[str, Any]] = [
    {}, {"pad": "cycled", "table": [3, 5]}, {"pad": "none", "smooth": False}, {"skip_tune": [0.5, 0.7]},
    {"freeu": [0.3, 0.2, 1.1, 1.2]}, {"width": 516, "depth": 3}, {"conv": 2, "recurrence": "reference"},
]  # fmt: skip


@pytest.mark.parametrize("options", PACKS)
def test_images_of_a_pack_are_as_alone(options: dict[str, Any]) -> None:
    net, z, y = small(**options), latents(SIZES), torch.arange(len(SIZES))
    for layout in (Packed(2), STATIC):
        batch = layout.to_batch(z, y)
        for i, found in enumerate(layout.to_latents(output(net, batch), batch)):
            with torch.no_grad():
                wanted = net(Dense(2).to_batch([z[i]], y[i : i + 1]), times(batch)[i : i + 1])[0]
            torch.testing.assert_close(found, wanted, atol=1e-5 * wanted.abs().max().item(), rtol=0)


def test_gradients_of_a_pack_are_those_of_its_images() -> None:
    net, z = small(), latents(SIZES)
    batch = STATIC.to_batch(z, torch.arange(len(z)))
    loss, found = loss_and_gradients(net, batch, times(batch))
    total, losses = dict[str, Tensor](), list[Tensor]()
    for i, image in enumerate(z):
        one = Dense(2).to_batch([image], torch.tensor([i]))
        own_loss, own = loss_and_gradients(net, one, times(batch)[i : i + 1])
        total = {name: total.get(name, 0) + own[name] for name in own}
        losses.append(own_loss)
    torch.testing.assert_close(loss, sum(losses), rtol=1e-5, atol=0)
    assert_equal_gradients(found, total, 1e-4)


def test_filler_of_any_kind_changes_nothing() -> None:
    """Neither its values, which are as large as numbers can be, nor how much of it there is."""
    net, z, y = small(), latents(SIZES[:2]), torch.arange(2)
    plain = Packed(2).to_batch(z, y)
    used = len(plain.x)
    for max_tokens, max_images in ((used, 2), (used + 1, 3), (4 * used, 9)):
        batch = Packed(2, max_tokens, max_images, filler_label=10).to_batch(z, y)
        batch.x[used:] = 1e4
        with torch.no_grad():
            t = nn.functional.pad(TIMES, (0, max_images - 1))
            torch.testing.assert_close(net(batch, t)[:used], net(plain, TIMES), atol=1e-5, rtol=1e-5)


def pack_of(rows: int) -> Batch:
    layout = Packed(2, max_tokens=512, max_images=6, filler_label=10)
    return layout.to_batch(latents([(2 * rows, 2 * n) for n in (4, 7, 9)]), torch.arange(3))


def test_packs_have_few_shapes() -> None:
    net = small()
    assert len({net.framed(pack_of(rows)).tokens for rows in range(4, 15)}) == 3


@pytest.mark.usefixtures("fresh_compiler")
def test_blocks_are_compiled_at_most_twice_for_packs_of_any_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    counted, net, seen = CompileCounter(), small(depth=3), list[int]()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counted))
    net.train().compile_blocks()
    for rows in (4, 6, 12, 14):
        batch = pack_of(rows)
        net(batch, times(batch)).sum().backward()
        seen.append(counted.frame_count)
    assert seen[0] > 0 and seen[1:] == [2 * seen[0]] * 3


CHANGES: dict[str, Any] = {
    "pad": "cycled", "smooth": False, "directions": 1, "long_skips": False, "skip_tune": [0.5, 0.7],
    "freeu": [0.3, 0.2, 1.1, 1.2], "states": 8, "conv": 2, "expand": 3,
}  # fmt: skip


@pytest.mark.parametrize("key", CHANGES)
def test_every_option_is_in_the_network(key: str) -> None:
    plain, changed = small(), small(**{key: CHANGES[key]})
    shapes = [{name: p.shape for name, p in net.named_parameters()} for net in (plain, changed)]
    if shapes[0] == shapes[1]:
        changed.load_state_dict(plain.state_dict())
        assert (output(plain, images()) - output(changed, images())).abs().max() > 1e-4


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("layout", [Dense(2), STATIC])
def test_compiled_equals_eager(layout: Dense | Packed) -> None:
    batch = layout.to_batch(latents([(8, 8)] * 2), torch.tensor([1, 2]))
    eager, compiled = small(depth=3), small(depth=3)
    compiled.load_state_dict(eager.state_dict())
    compiled.compile(fullgraph=True, backend="aot_eager")
    loss, gradients = loss_and_gradients(eager.train(), batch, times(batch))
    again, others = loss_and_gradients(compiled.train(), batch, times(batch))
    torch.testing.assert_close(again, loss, rtol=1e-5, atol=0)
    assert_equal_gradients(others, gradients, 1e-4)


def test_forms_of_the_recurrence_agree() -> None:
    plain, other = small(), small(recurrence="reference")
    other.load_state_dict(plain.state_dict())
    torch.testing.assert_close(output(plain, images()), output(other, images()), atol=1e-5, rtol=1e-5)


def test_inputs_are_rounded_in_training_alone() -> None:
    net = small(bf16_inputs=True)
    exact, batch = small(), images()
    exact.load_state_dict(net.state_dict())
    assert torch.equal(output(net, batch), output(exact, batch))
    with torch.no_grad():
        rounded, found = net.train()(batch, torch.tensor([998.0, 600.0])), exact.train()(batch, TIMES + 1)
        x = Dense(2).to_batch(list(batch.x.bfloat16().float()), batch.y)
        assert torch.equal(rounded, exact(x, torch.tensor([999.0, 599.0])))  # told 999 -> 1000, and 601 -> 600
    assert not torch.equal(rounded, found)


def test_orders_go_to_the_middle_block_and_back_at_any_depth() -> None:
    for depth in range(1, 12):
        orders = scan_orders(depth, 4)
        assert orders == orders[::-1] and orders[: (depth + 1) // 2] == [ORDERS[i % 4] for i in range((depth + 1) // 2)]
    assert set(scan_orders(9, 2)) == set(ORDERS[:2]) and set(scan_orders(9, 1)) == {ORDERS[0]}


@pytest.mark.parametrize("depth", [2, 6, 7])
def test_a_skip_is_in_the_order_of_its_receiver(depth: int) -> None:
    """Blocks that change nothing, and skips alone that are passed on, leave all tokens where they were."""
    net = fresh(depth=depth)
    for block in net.blocks:
        block.attn1.out_proj.weight.data.zero_()
        if block.skip_linear is not None:
            block.skip_linear.weight.data.copy_(torch.cat([torch.zeros(32, 32), torch.eye(32)], dim=1))
    assert sum(block.skip_linear is not None for block in net.blocks) == (depth - 1) // 2
    for batch in (images(), STATIC.to_batch(latents(SIZES), torch.arange(4))):
        framed = net.framed(batch)
        x = torch.randn(*(2,) * (batch.image_of is None), framed.tokens, 32)
        with torch.no_grad():
            assert torch.equal(net.run_blocks(x, torch.zeros(len(batch.y), 96), framed), x)


def test_what_a_block_gives_is_seen_by_rows() -> None:
    net, seen = small(), list[Tensor]()
    for block in net.blocks:
        block.attn1.out_proj.weight.data.zero_()
        block.skip_linear = None
        block.register_forward_hook(lambda _, given, out: seen.append(out))
    for batch in (images(), STATIC.to_batch(latents(SIZES), torch.arange(4))):
        seen.clear()
        output(net, batch)
        every = [net.image_tokens(out, i, batch) for i, out in enumerate(seen)]
        assert every[0].shape == ((2, 16, 32) if batch.image_of is None else (90, 32))
        assert all(torch.equal(found, every[0]) for found in every)


def test_padding_lies_right_and_below() -> None:
    for cycled, below in ((False, [0, 0, 0, 0, 0, 1, 1, 1, 1, 1]), (True, [0, 1, 0, 1, 0, 1, 0, 1, 0, 1])):
        frame = Frame(1, 2, cycled, smooth=False)
        frame.pad_token_dec_split.data.zero_()
        frame.pad_token.data.copy_(torch.tensor([[[0.0, 1.0]]]))
        conditions, image = torch.tensor([[[10.0], [11.0]]]), torch.arange(12.0, 18.0)[:, None]  # 2 x 3 tokens
        dense = Dense(1).to_batch(latents([(2, 3)]), torch.zeros(1))
        for batch, x in ((dense, image[None]), (packed([(2, 3)]), image)):
            framed = Framed(batch, 1, 2, 4)
            found = frame(conditions, x, framed)
            assert found.flatten().tolist() == [10, 11, 0, 0, 12, 13, 14, 0, 1, 15, 16, 17, 0, 1, *below]
            assert torch.equal(frame.image(found, framed), x)


def test_other_sizes_have_interpolated_positions() -> None:
    net, whole = small(), small(table=[8, 8])
    state = {**net.state_dict(), "additional_embed": resized(net.additional_embed, (4, 4), (8, 8))}
    whole.load_state_dict(state)
    torch.testing.assert_close(output(net, images(16)), output(whole, images(16)))
    conditions = net.additional_embed[:, :2]
    assert torch.equal(whole.additional_embed[:, :2], conditions)


def test_larger_images_begin_with_the_weights_of_smaller_ones() -> None:
    weak, strong = small(), fresh(table=[8, 8], pad="cycled")
    module = training_module(strong)
    assert type(module) is DiMModule is module_class(DiM)
    state, remarks = module.starting_weights(weak.state_dict())
    strong.load_state_dict(state)
    assert remarks == ["  positions of 4 x 4 tokens are interpolated to 8x8"]
    assert torch.equal(strong.additional_embed, resized(weak.additional_embed, (4, 4), (8, 8)))
    same, none = training_module(fresh()).starting_weights(weak.state_dict())
    assert none == [] and torch.equal(same["additional_embed"], weak.additional_embed)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("pad", "right", "model.pad=right is unknown; choose one of lateral, cycled, none"),
        ("table", [4], "model.table=[4] must be [rows,columns], in tokens"),
        ("directions", 5, "model.directions=5 must be 1, 2, 3 or 4"),
        ("skip_tune", [0.5], "model.skip_tune=[0.5] must be 2 numbers, or null"),
        ("freeu", [1, 2], "model.freeu=[1, 2] must be 4 numbers, or null"),
        ("freeu", [1, 2, "a", 4], "model.freeu=a must be a finite number"),
        ("conv", 0, "model.conv=0 must be a whole number of at least 1"),
        ("recurrence", "fast", "model.recurrence=fast is unknown; choose one of auto, reference, chunked, mamba_ssm"),
    ],
)
def test_what_is_no_option_is_named(key: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError) as error:
        fresh(**{key: value})
    assert str(error.value) == message
