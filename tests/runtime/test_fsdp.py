"""Clipping, whose norm is measured before."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from genfound.runtime import fsdp


@pytest.mark.parametrize("limit", [0.5, 1 - 1e-6, 1.0, 1 + 1e-6, 2.0, float("inf")])
def test_gradients_are_those_of_torch_and_untouched_below_the_limit(limit: float) -> None:
    own, known = ([nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(1))] for _ in range(2))
    for parameters in (own, known):
        parameters[0].grad, parameters[1].grad = torch.tensor([0.6, 0.0, -0.64]), torch.tensor([0.48])  # of norm 1
    gradients = [p.grad for p in own if p.grad is not None]
    before = [grad._version for grad in gradients]
    fsdp.clip(own, limit, fsdp.total_norm(gradients))
    nn.utils.clip_grad_norm_(known, limit)
    assert all(
        a.grad is not None and b.grad is not None and torch.equal(a.grad, b.grad)
        for a, b in zip(own, known, strict=True)
    )
    assert ([grad._version for grad in gradients] == before) == (limit > 1 + 5e-7)


def test_a_norm_that_is_no_number_is_not_below_the_limit() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([torch.nan, 1.0])
    fsdp.clip([parameter], 1.0, fsdp.total_norm([parameter.grad]))
    assert parameter.grad.isnan().all()
