"""What passes from block to block in bfloat16, as an option of NiT, NiT for text and FiT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from genfound.backbones.base import Backbone
from genfound.batch import Batch
from tests.backbones.test_fit import small_fit
from tests.backbones.test_nit import SIZES, TIMES
from tests.backbones.test_nit_t2i import described, network
from tests.cli.commands import genfound, one_error
from tests.helpers import packed, small_nit, three_layouts

NETS: dict[str, Callable[..., Backbone]] = {"nit": small_nit, "nit_t2i": network, "fit": small_fit}
BATCHES: dict[str, Callable[[], list[Batch]]] = {
    "nit": lambda: [packed(SIZES)],
    "nit_t2i": lambda: [described(packed(SIZES))],
    "fit": lambda: list(three_layouts([(2 * h, 2 * w) for h, w in SIZES], 2).values())[::2],  # padded and packed
}


def streams(net: Backbone) -> list[Any]:
    """The dtypes of what the blocks were given and made, filled by each forward pass."""
    found: list[torch.dtype] = []
    for block in net.blocks:
        block.register_forward_hook(lambda _, inputs, out: found.extend([inputs[0].dtype, out.dtype]))
    return found


@pytest.mark.parametrize("family", NETS)
def test_only_bf16_arithmetic_rounds_what_passes_from_block_to_block(family: str) -> None:
    wide, narrow = (NETS[family](residual=residual) for residual in ("fp32", "bf16"))
    kept, rounded = streams(wide), streams(narrow)
    for batch in BATCHES[family]():
        times = torch.nn.functional.pad(TIMES, (0, len(batch.y) - len(TIMES)))
        exact = wide(batch, times)
        assert torch.equal(narrow(batch, times), exact) and {*kept, *rounded} == {torch.float32}
        kept.clear()
        rounded.clear()
        with torch.autocast("cpu", torch.bfloat16):
            outs: list[Tensor] = [net(batch, times) for net in (wide, narrow)]
        assert set(kept) == {torch.float32} and set(rounded) == {torch.bfloat16}
        assert all(out.dtype == torch.float32 for out in outs) and not torch.equal(*outs)
        assert (outs[1] - exact).norm() < 0.05 * exact.norm()
        kept.clear()
        rounded.clear()


def test_another_precision_is_one_clear_line(tmp_path: Path) -> None:
    refused = genfound("train", "model=nit_tiny", "model.residual=fp16", cwd=tmp_path)
    assert "model.residual=fp16 is unknown" in one_error(refused)
