"""Which settings of a run make sense."""

from __future__ import annotations

import pytest

from genfound.config.options import check, expert_shares
from tests.helpers import composed


@pytest.mark.parametrize(
    ("options", "shares"),
    [
        ("model=dit_moe_tiny trainer.devices=4", [1, 2, 4]),
        ("model=dit_moe_tiny trainer.devices=2 trainer.num_nodes=2", [1, 2, 4]),
        ("model=dit_moe_tiny trainer.devices=16 model.experts=6", [1, 2]),
        (
            "model=dit_moe_tiny trainer.devices=6 model.experts=6",
            [1, 3, 6],
        ),  # three copies do not divide a width of 128
        ("model=dit_moe_tiny trainer.devices=6 model.experts=6 model.width=96 model.heads=3", [1, 2, 3, 6]),
        ("model=dit_moe_tiny", [1]),
        ("model=nit_tiny trainer.devices=4", [1]),
    ],
)
def test_processes_share_whole_copies_of_the_experts(options: str, shares: list[int]) -> None:
    config = composed(*options.split(), "strategy=fsdp")
    assert expert_shares(config) == shares
    for share in range(1, 9):
        config["strategy"]["expert_parallel"] = share
        if share in shares:
            check(config)
        else:
            with pytest.raises(ValueError, match=rf"strategy\.expert_parallel={share} (must divide|divides experts)"):
                check(config)
