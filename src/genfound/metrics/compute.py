"""The figures of a set of samples, under a named convention.

Only one process computes them, of features that all of them have made, so its metrics are not synchronised.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from genfound.metrics.extractor import Extractor
from genfound.metrics.features import FeatureStore
from genfound.metrics.frechet import FrechetDistance
from genfound.metrics.inception_score import InceptionScore
from genfound.metrics.kid import SUBSET, KernelDistance
from genfound.metrics.precision_recall import NEIGHBOURS, PrecisionRecall
from genfound.metrics.reference_stats import Reference

CONVENTIONS = ("adm", "adm_half", "torch_fidelity")
"""ADM's evaluator with exact distances, the same with its float16 distances, and torch-fidelity."""

PROBE = "probe"
"""The extractor, and the convention of its figures: exact distances, no Inception Score."""

SPLIT = 5000
FULL = 50_000
"""The count that goes without saying; a figure of any other carries it in its name."""

STORED, CONTENT = "as stored", "by content"
"""Orders of samples: that of an npz file, or of the numbers they are drawn by; and that of the SHA-256 of files."""


def compute(
    samples: FeatureStore,
    reference: Reference,
    extractor: Extractor,
    convention: str,
    labels: np.ndarray | None,
    device: torch.device,
) -> dict[str, float]:
    """Frechet distances, Inception Score, precision and recall, as far as the extractor and the reference go.

    Args:
        samples: features of the samples, complete.
        reference: of the same extractor.
        extractor: what computed the features.
        convention: one of `CONVENTIONS`.
        labels: of the samples, for the accuracy of a probe.
        device: where to compute.

    Raises:
        ValueError: a convention that is unknown or does not fit, fewer images than features, or features that are
            not finite.
    """
    check_convention(convention, extractor.name)
    check_count("n", samples.count, extractor)
    check_reference(reference, extractor, convention)
    if extractor.name == PROBE:
        figures = _probe_figures(samples, reference, labels, device)
    else:
        figures = _inception_figures(samples, reference, convention, device)
    return {metric_name(name, samples.count, extractor.name): value for name, value in figures.items()}


def check_convention(convention: str, extractor: str) -> None:
    """Raise a ValueError for an unknown convention, or for one of Inception's that a probe would ignore."""
    if convention not in CONVENTIONS:
        raise ValueError(f"convention={convention} is unknown; choose one of {', '.join(CONVENTIONS)}")
    if extractor == PROBE and convention != CONVENTIONS[0]:
        raise ValueError(
            f"convention={convention} is one of Inception's figures, and a probe has its own; leave it at "
            f"{CONVENTIONS[0]}, or choose extractor=inception"
        )


def convention_of(convention: str, extractor: str) -> str:
    """As the protocol names it: figures of a probe have a convention of their own."""
    return PROBE if extractor == PROBE else convention


def depends_on_order(convention: str, count: int) -> bool:
    """Whether a figure depends on the order of the samples: a divided Inception Score, or a kernel distance."""
    return convention == "torch_fidelity" or (convention != PROBE and count > SPLIT)


def check_count(what: str, count: int | None, extractor: Extractor) -> None:
    """Raise a ValueError if a Frechet distance would be one of singular covariances."""
    if count is not None and count < extractor.width:
        raise ValueError(
            f"{what}: {count:,} images are fewer than the {extractor.width:,} features of {extractor.name}; their "
            f"covariance is singular and the distance means nothing; use at least {extractor.width:,}"
        )


def check_reference(reference: Reference, extractor: Extractor, convention: str) -> None:
    """Raise a ValueError for a reference of too few images: see `check_count`, or too few points for a figure."""
    check_count("reference", reference.note.get("images"), extractor)
    points = len(reference.points) if reference.points is not None else None
    if points is not None and convention == "torch_fidelity" and points < SUBSET:
        raise ValueError(f"kid: subsets of {SUBSET:,} images need at least as many, and the reference has {points:,}")
    if points is not None and points <= NEIGHBOURS:
        raise ValueError(
            f"reference: {points} images are too few for precision and recall, which need {NEIGHBOURS} nearest "
            "neighbours of each; give more, or statistics alone"
        )


def metric_name(name: str, count: int, extractor: str) -> str:
    """`fid` of 50,000 samples, `fid@10k` of 10,000; a probe's figures always have its own name."""
    if extractor == PROBE:
        return {"fid": "fd_probe"}.get(name, f"{name}_probe")
    if count == FULL:
        return name
    return f"{name}@{count // 1000}k" if count % 1000 == 0 else f"{name}@{count}"


def _inception_figures(
    samples: FeatureStore, reference: Reference, convention: str, device: torch.device
) -> dict[str, float]:
    figures = _distances(samples, reference, device)
    fidelity = convention == "torch_fidelity"
    score = InceptionScore(None if fidelity else SPLIT, sync_on_compute=False).to(device)
    score.update(samples.column("logits"))
    mean, std = (float(value) for value in score.compute())
    figures["inception_score"] = mean
    if fidelity:
        figures.pop("sfid", None)
        figures["inception_score_std"] = std
    if reference.points is not None:
        points = samples.column("pool")
        if fidelity:
            kid = KernelDistance(reference.points, size=SUBSET, sync_on_compute=False)
            kid.update(points)
            figures |= zip(("kid", "kid_std"), map(float, kid.compute()), strict=True)
        figures |= _precision_recall(points, reference.points, convention == "adm_half", device)
    return figures


def _probe_figures(
    samples: FeatureStore, reference: Reference, labels: np.ndarray | None, device: torch.device
) -> dict[str, float]:
    figures = _distances(samples, reference, device)
    if labels is not None:
        right = samples.column("logits").argmax(dim=1) == torch.from_numpy(labels)
        figures["accuracy"] = float(right.double().mean())
    if reference.points is not None:
        figures |= _precision_recall(samples.column("pool"), reference.points, False, device)
    return figures


def _distances(samples: FeatureStore, reference: Reference, device: torch.device) -> dict[str, float]:
    """`fid`, and `sfid` where the reference has spatial statistics."""
    figures = {}
    for column, name in (("pool", "fid"), ("spatial", "sfid")):
        if column in reference.gaussians and samples.width(column):
            distance = FrechetDistance(samples.width(column), reference.gaussians[column], sync_on_compute=False)
            for block in samples.blocks(column):
                distance.to(device).update(block)
            figures[name] = float(distance.compute())
    return figures


def _precision_recall(points: Tensor, reference: Tensor, half: bool, device: torch.device) -> dict[str, float]:
    metric = PrecisionRecall(reference, NEIGHBOURS, half, sync_on_compute=False).to(device)
    metric.update(points)
    return {name: float(value) for name, value in metric.compute().items()}
