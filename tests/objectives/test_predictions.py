from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from genfound.objectives.interpolants import INTERPOLANTS, Coefficients
from genfound.objectives.predictions import PREDICTIONS, Predictions


def true_views(path: str, part: float) -> tuple[Predictions, dict[str, torch.Tensor]]:
    """A state with all its parts, in float64; `Views` of its velocity."""
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 3, 5, dtype=torch.float64, generator=generator)
    point = Coefficients.at(INTERPOLANTS[path], part * INTERPOLANTS[path].end)
    parts = {"x0": x0, "noise": noise, "velocity": point.velocity(x0, noise), "score": -noise / point.sigma}
    return Predictions("velocity", parts["velocity"], point.state(x0, noise), point), parts


@given(path=st.sampled_from(sorted(INTERPOLANTS)), part=st.floats(0.02, 0.98), kind=st.sampled_from(PREDICTIONS))
def test_every_prediction_gives_every_other_one(path: str, part: float, kind: str) -> None:
    views, parts = true_views(path, part)
    seen = Predictions(kind, parts[kind], views.x, views.point)
    for other in PREDICTIONS:
        torch.testing.assert_close(getattr(seen, other), parts[other], atol=1e-4, rtol=1e-4)


@given(path=st.sampled_from(sorted(INTERPOLANTS)), part=st.floats(0.02, 0.98))
def test_conversions_are_inverses(path: str, part: float) -> None:
    views, _ = true_views(path, part)
    out = torch.linspace(-2, 2, 15, dtype=torch.float64).view(3, 5)  # what any network may say
    for kind in PREDICTIONS:
        for other in PREDICTIONS:
            there = getattr(Predictions(kind, out, views.x, views.point), other)
            back = getattr(Predictions(other, there, views.x, views.point), kind)
            torch.testing.assert_close(back, out, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("part", [0.0, 1.0])
@pytest.mark.parametrize("path", ["linear", "gvp", "cosine", "triangle"])
def test_a_velocity_knows_noise_and_data_at_both_ends(path: str, part: float) -> None:
    views, parts = true_views(path, part)
    for kind in ("x0", "noise"):
        torch.testing.assert_close(getattr(views, kind), parts[kind], atol=1e-4, rtol=1e-4)


def test_coefficients_may_belong_to_each_image() -> None:
    t = torch.tensor([0.2, 0.7])
    x0, noise = torch.randn(2, 2, 4)
    point = Coefficients(*(v[:, None] for v in INTERPOLANTS["linear"].point(t)))
    views = Predictions("velocity", point.velocity(x0, noise), point.state(x0, noise), point)
    torch.testing.assert_close(views.x0, x0)
    torch.testing.assert_close(views.score, -noise / t[:, None])
