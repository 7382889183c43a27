"""The metrics as `torchmetrics.Metric`: in a plain loop, from images, and on two processes."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed
from torch import multiprocessing as mp

from genfound.metrics.feature_metric import FeatureMetric
from genfound.metrics.frechet import FrechetDistance, Moments, frechet_distance
from genfound.metrics.inception_score import InceptionScore, adm_score, torch_fidelity_score
from genfound.metrics.kid import KernelDistance, kernel_distance
from genfound.metrics.precision_recall import PrecisionRecall, manifold, precision_recall
from tests.image_sets import Averages, Pictures


def features(count: int, seed: int, width: int = 6) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) + seed / 10


REAL, SAMPLES = features(90, 1), features(130, 2)


def pairs() -> list[FeatureMetric]:
    """Those that compare two sets."""
    return [FrechetDistance(6), PrecisionRecall(), KernelDistance(subsets=5, size=20)]


def values(metric: FeatureMetric) -> list[float]:
    found = metric.compute()
    parts = found.values() if isinstance(found, dict) else found if isinstance(found, tuple) else [found]
    return [float(part) for part in parts]


def test_a_plain_loop_gives_what_the_functions_give() -> None:
    distance, shares, kid = pairs()
    score, fidelity = InceptionScore(split_size=40), InceptionScore(split_size=None)
    for metric in (distance, shares, kid):
        for rows in REAL.split(32):
            metric.update(rows, real=True)
        for rows in SAMPLES.split(50):
            metric.update(rows)
    for rows in SAMPLES.split(50):
        score.update(rows)
        fidelity.update(rows)
    gaussians = [Moments.of(rows).gaussian() for rows in (SAMPLES, REAL)]
    assert values(distance) == pytest.approx([frechet_distance(*gaussians)], rel=1e-12)
    expected = precision_recall(manifold(REAL, [3]), manifold(SAMPLES, [3]))
    assert values(shares) == [expected.precision[0], expected.recall[0]]
    assert values(kid) == list(kernel_distance(SAMPLES, REAL, 5, 20))
    assert values(score) == list(adm_score(SAMPLES, 40)) and values(fidelity) == list(torch_fidelity_score(SAMPLES))
    before = values(distance)
    distance.reset()
    distance.update(REAL, real=True)
    distance.update(SAMPLES + 1)
    assert values(distance)[0] > before[0]


def test_a_given_reference_is_that_of_real_images() -> None:
    distance = FrechetDistance(6, Moments.of(REAL).gaussian())
    given = [distance, PrecisionRecall(REAL), KernelDistance(REAL, subsets=5, size=20)]
    for metric, collecting in zip(given, pairs(), strict=True):
        metric.update(SAMPLES)
        collecting.update(SAMPLES)
        collecting.update(REAL, real=True)
        assert values(metric) == values(collecting)
        with pytest.raises(ValueError, match="real=True: this metric was given its reference"):
            metric.update(REAL, real=True)


def test_images_are_turned_into_features_by_an_extractor() -> None:
    pictures = Pictures([(6, 8)] * 20)
    images = torch.stack([torch.from_numpy(image) for image in pictures.images])
    pool = Averages()(pictures.images)
    for column, width in (("pool", 6), ("spatial", 4)):
        reference = Moments.of(features(30, 3, width)).gaussian()
        metric = FrechetDistance(width, reference, extractor=Averages(), column=column)
        metric.update(images[:12])
        metric.update(pictures.images[12:])
        expected = frechet_distance(Moments.of(pool[column]).gaussian(), reference)
        assert values(metric) == pytest.approx([expected], rel=1e-12)
    score = InceptionScore(20, extractor=Averages())
    score.update(images)
    assert values(score) == list(adm_score(pool["logits"], 20))
    with pytest.raises(ValueError, match=r"PrecisionRecall\(extractor=...\) is needed"):
        PrecisionRecall().update(images)
    with pytest.raises(ValueError, match=r"images must be uint8 \(height, width, 3\)"):
        score.update(images.permute(0, 3, 1, 2))


def share(rank: int, folder: Path) -> None:
    """One of two processes with a part of each set, of different sizes."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    real, samples = (x[:50] if rank == 0 else x[50:] for x in (REAL, SAMPLES))
    found = []
    for metric in (*pairs(), InceptionScore(40), InceptionScore(None)):
        metric.update(samples)
        if not isinstance(metric, InceptionScore):
            metric.update(real, real=True)
        found.append(values(metric))
    torch.save(found, folder / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_the_figures_of_one(tmp_path: Path) -> None:
    mp.spawn(share, (tmp_path,), nprocs=2)
    expected = []
    for metric in (*pairs(), InceptionScore(40), InceptionScore(None)):
        metric.update(SAMPLES)
        if not isinstance(metric, InceptionScore):
            metric.update(REAL, real=True)
        expected.append(values(metric))
    for rank in range(2):
        for found, of_one in zip(torch.load(tmp_path / f"{rank}.pt"), expected, strict=True):
            assert found == pytest.approx(of_one, rel=1e-9)
