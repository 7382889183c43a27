"""DiM: each option in the network, its tokens, how it begins, and larger images from smaller ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from genfound import build
from genfound.backbones.dim import DiM, Frame, resized, scan_orders
from genfound.batch import Batch
from genfound.layers.scans import ORDERS
from genfound.layouts import Dense
from genfound.modules.base import module_class
from genfound.modules.dim import DiMModule
from genfound.tokenizers import LatentSpec
from tests.helpers import assert_equal_gradients, composed, latents, loss_and_gradients, training_module

SMALL: dict[str, Any] = {"width": 32, "depth": 7, "table": [4, 4], "states": 4}
TIMES = torch.tensor([10.0, 600.0])


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
        return net(batch, TIMES)


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
def test_compiled_equals_eager() -> None:
    eager, compiled = small(depth=3), small(depth=3)
    compiled.load_state_dict(eager.state_dict())
    compiled.compile(fullgraph=True, backend="aot_eager")
    loss, gradients = loss_and_gradients(eager.train(), images(), TIMES)
    again, others = loss_and_gradients(compiled.train(), images(), TIMES)
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
    x = torch.randn(1, 5 + 49, 32)
    with torch.no_grad():
        assert torch.equal(net.run_blocks(x, torch.zeros(1, 96), 4, 4), x)


def test_what_a_block_gives_is_seen_by_rows() -> None:
    net, seen = small(), list[Tensor]()
    for block in net.blocks:
        block.attn1.out_proj.weight.data.zero_()
        block.skip_linear = None
        block.register_forward_hook(lambda _, given, out: seen.append(out))
    output(net, images())
    every = [net.image_tokens(out, i, images()) for i, out in enumerate(seen)]
    assert every[0].shape == (2, 16, 32)
    assert all(torch.equal(found, every[0]) for found in every)


def test_padding_lies_right_and_below() -> None:
    for cycled, below in ((False, [0, 0, 0, 0, 0, 1, 1, 1, 1, 1]), (True, [0, 1, 0, 1, 0, 1, 0, 1, 0, 1])):
        frame = Frame(1, 2, cycled, smooth=False)
        nn.init.zeros_(frame.pad_token_dec_split)
        frame.pad_token.data.copy_(torch.tensor([[[0.0, 1.0]]]))
        x = torch.arange(10.0, 18.0)[None, :, None]  # two conditions and 2 x 3 tokens
        found = frame(x, 2, 3)[0, :, 0].tolist()
        assert found == [10, 11, 0, 0, 12, 13, 14, 0, 1, 15, 16, 17, 0, 1, *below]
        assert torch.equal(frame.image(frame(x, 2, 3), 2, 3), x[:, 2:])


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
        ("conv", 0, "model.conv=0 must be a whole number of at least 1"),
        ("recurrence", "fast", "model.recurrence=fast is unknown; choose one of auto, reference, chunked, mamba_ssm"),
    ],
)
def test_what_is_no_option_is_named(key: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError) as error:
        fresh(**{key: value})
    assert str(error.value) == message
