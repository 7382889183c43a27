from __future__ import annotations

import numpy as np
import pytest
import torch

from genfound.objectives.interpolants import INTERPOLANTS
from genfound.objectives.predictions import PREDICTIONS, Predictions
from genfound.objectives.weighting import WEIGHTINGS, image_weight, time_weight

T = torch.tensor([0.1, 0.3, 0.6, 0.9], dtype=torch.float64)


def test_image_weights() -> None:
    tokens = [1, 4, 256]
    expected = {"image": [1, 1, 1], "sqrt": [1, 2, 16], "token": [1, 4, 256]}
    for rule, weights in expected.items():
        assert [image_weight(float(n), rule) for n in tokens] == weights
        assert image_weight(np.array(tokens), rule).tolist() == weights
        assert image_weight(torch.tensor(tokens), rule).tolist() == weights


@pytest.mark.parametrize("weighting", [w for w in WEIGHTINGS if w != "none"])
@pytest.mark.parametrize("path", INTERPOLANTS)
def test_a_weighting_is_one_loss_whatever_is_predicted(weighting: str, path: str) -> None:
    """The same wrong answer, given as noise, data, velocity or score, costs the same."""
    point = INTERPOLANTS[path].point(T * INTERPOLANTS[path].end)
    x, right, wrong = torch.randn(3, 4, dtype=torch.float64)
    costs = []
    for kind in PREDICTIONS:
        a, b = (getattr(Predictions("noise", out, x, point), kind) for out in (right, wrong))
        error = (point.sigma * (a - b) if kind == "score" else a - b) ** 2
        costs.append(time_weight(weighting, kind, point, 5.0) * error)
    for cost in costs[1:]:
        torch.testing.assert_close(cost, costs[0], atol=1e-5, rtol=1e-4)


def test_weights_by_their_names() -> None:
    point = INTERPOLANTS["linear"].point(T)
    snr = ((1 - T) / T) ** 2
    torch.testing.assert_close(time_weight("velocity", "velocity", point, 5.0), torch.ones_like(T))
    torch.testing.assert_close(time_weight("min_snr", "x0", point, 5.0), snr.clamp(max=5))
    torch.testing.assert_close(time_weight("min_snr", "noise", point, 5.0), (5 / snr).clamp(max=1))
    torch.testing.assert_close(time_weight("likelihood", "score", point, 5.0), 1 / (T * (1 - T)))


def test_a_velocity_has_finite_weights_at_both_ends() -> None:
    point = INTERPOLANTS["linear"].point(torch.tensor([0.0, 1.0]))
    for weighting in ("velocity", "min_snr"):
        assert time_weight(weighting, "velocity", point, 5.0).isfinite().all()
