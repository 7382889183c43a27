"""The simulated GPU refuses what an Apple GPU does not do."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.apple_gpu import apple_gpu


def test_the_simulation_has_the_rules_of_the_gpu() -> None:
    with apple_gpu():
        x = torch.ones(3, device="mps")
        view = x[1:]
        assert view.add_(1) is view and x.tolist() == [1, 2, 2] and x.device == torch.device("mps", 0)
        for wrong in (
            x.double,
            lambda: torch.zeros(3, dtype=torch.float64, device="mps"),
            lambda: torch.tensor(np.float64(1), device=x.device),
            lambda: torch.ones(3, dtype=torch.float64).to("mps", torch.float32),
            lambda: x.to("cpu", torch.float64),
            lambda: x * torch.tensor(1.0, dtype=torch.float64),
            x.numpy,
        ):
            with pytest.raises(TypeError):
                wrong()
        for mixed in (lambda: x + torch.ones(3), lambda: torch.where(torch.ones(3).bool(), x, x)):
            with pytest.raises(RuntimeError, match="same device"):
                mixed()
        with pytest.raises(RuntimeError, match="draws other numbers"):
            torch.randn(3, device="mps")
        with pytest.raises(NotImplementedError, match="segment_reduce"):
            torch.segment_reduce(x, "sum", offsets=torch.tensor([0, 3], device="mps"))
        assert (x + torch.tensor(1.0)).cpu().sum() == 8
