import math

import pytest
import torch

from genfound.metrics.inception_score import adm_score, torch_fidelity_score


def test_equal_probabilities_score_one_and_sure_ones_the_number_of_classes() -> None:
    assert adm_score(torch.zeros(40, 7), 20).mean == pytest.approx(1)
    sure = 1000 * torch.eye(5).repeat(8, 1)
    assert adm_score(sure, 40).mean == pytest.approx(5, rel=1e-6)
    assert torch_fidelity_score(sure, 1).mean == pytest.approx(5, rel=1e-6)


def test_images_sorted_by_class_score_lower() -> None:
    sure = 1000 * torch.eye(4)[torch.arange(80) % 4]
    in_order = sure[torch.argsort(torch.arange(80) % 4, stable=True)]
    assert adm_score(sure, 20).mean == pytest.approx(4, rel=1e-6)
    assert adm_score(in_order, 20).mean == pytest.approx(1, rel=1e-6)
    assert torch_fidelity_score(in_order, 2).mean > 3.5


def test_a_short_last_split_weighs_as_much() -> None:
    logits = torch.cat([torch.zeros(20, 2), 1000 * torch.eye(2)])
    score = adm_score(logits, 20)
    assert score.mean == pytest.approx((1 + 2) / 2, rel=1e-6)
    assert score.std == pytest.approx(0.5, rel=1e-6)


def test_the_formula() -> None:
    p = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]], dtype=torch.float64)
    mean = p.mean(0)
    divergence = (p * (p.log() - mean.log())).sum(1).mean()
    assert adm_score(p.log(), 3).mean == pytest.approx(math.exp(divergence), rel=1e-12)


def test_a_split_without_an_image_is_refused() -> None:
    assert torch_fidelity_score(torch.zeros(10, 3)).mean == pytest.approx(1)
    with pytest.raises(ValueError, match="inception_score: 9 images cannot be divided into 10 splits"):
        torch_fidelity_score(torch.zeros(9, 3))
