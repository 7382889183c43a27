"""The figures of a set of samples, under a named convention.

One process computes them, of features that all of them have made, by the functions that the metrics are made of.
"""

import numpy as np
import torch

from genfound.config.checks import one_of
from genfound.metrics.extractor import Extractor
from genfound.metrics.features import FeatureStore
from genfound.metrics.frechet import frechet_distance
from genfound.metrics.inception_score import adm_score, torch_fidelity_score
from genfound.metrics.kid import SUBSET, kernel_distance
from genfound.metrics.precision_recall import NEIGHBOURS, shares_of_one_radius
from genfound.metrics.reference_stats import Reference

FIDELITY = "torch_fidelity"
CONVENTIONS = ("adm", "adm_half", FIDELITY)
"""ADM's evaluator with exact distances, the same with its float16 distances, and torch-fidelity."""

PROBE = "probe"
"""The extractor, and the convention of its figures: exact distances, no Inception Score."""

SPLIT = 5000
FULL = 50_000
"""The count that goes without saying; a figure of any other carries it in its name."""

STORED, CONTENT = "as stored", "by content"
"""Orders of samples: that of an npz file, or of the numbers they are drawn by; and that of the SHA-256 of files."""


def compute(
    samples: FeatureStore, reference: Reference, extractor: Extractor, convention: str, labels: np.ndarray | None,
    device: torch.device,
) -> dict[str, float]:  # fmt: skip
    """Frechet distances, Inception Score, precision and recall, as far as the extractor and the reference go.

    The features of the samples are complete; their labels are for the accuracy of a probe.
    """
    check_convention(convention, extractor.name)
    check_count("n", samples.count, extractor)
    check_reference(reference, extractor, convention)
    fidelity, figures = convention == FIDELITY, dict[str, float]()
    for column, name in (("pool", "fid"), ("spatial", "sfid")):
        if column in reference.gaussians and samples.width(column) and not (fidelity and name == "sfid"):
            figures[name] = frechet_distance(samples.gaussian(column, device), reference.gaussians[column])
    if extractor.name != PROBE and fidelity:
        figures |= torch_fidelity_score(samples.column("logits").to(device)).named("inception_score")
    elif extractor.name != PROBE:
        figures["inception_score"] = adm_score(samples.column("logits").to(device), SPLIT).mean
    elif labels is not None:
        right = samples.column("logits").argmax(dim=1) == torch.from_numpy(labels)
        figures["accuracy"] = float(right.double().mean())
    if reference.points is not None:
        points = samples.column("pool")
        if fidelity:
            figures |= kernel_distance(points, reference.points, size=SUBSET).named("kid")
        both, half = (reference.points.to(device), points.to(device)), convention == "adm_half"
        figures["precision"], figures["recall"] = shares_of_one_radius(*both, NEIGHBOURS, half)
    return {metric_name(name, samples.count, extractor.name): value for name, value in figures.items()}


def check_convention(convention: str, extractor: str) -> None:
    """Raise a ValueError for an unknown convention, or for one of Inception's that a probe would ignore."""
    one_of("convention", convention, CONVENTIONS)
    if extractor == PROBE and convention != CONVENTIONS[0]:
        way = f"leave it at {CONVENTIONS[0]}, or choose extractor=inception"
        raise ValueError(f"convention={convention} is one of Inception's figures, and a probe has its own; {way}")


def depends_on_order(convention: str, count: int) -> bool:
    """Whether a figure depends on the order of the samples: a divided Inception Score, or a kernel distance."""
    return convention == FIDELITY or (convention != PROBE and count > SPLIT)


def check_count(what: str, count: int | None, extractor: Extractor) -> None:
    """Raise a ValueError if a Frechet distance would be one of singular covariances."""
    if count is not None and count < extractor.width:
        why = "their covariance is singular and the distance means nothing"
        features = f"the {extractor.width:,} features of {extractor.name}"
        raise ValueError(f"{what}: {count:,} images are fewer than {features}; {why}; use at least {extractor.width:,}")


def check_reference(reference: Reference, extractor: Extractor, convention: str) -> None:
    """Raise a ValueError for a reference of too few images, or of too few points for a figure."""
    check_count("reference", reference.note.get("images"), extractor)
    if reference.points is None:
        return
    points = len(reference.points)
    if convention == FIDELITY and points < SUBSET:
        raise ValueError(f"kid: subsets of {SUBSET:,} images need at least as many, and the reference has {points:,}")
    if points <= NEIGHBOURS:
        what = f"precision and recall, which need {NEIGHBOURS} nearest neighbours of each"
        raise ValueError(f"reference: {points} images are too few for {what}; give more, or statistics alone")


def metric_name(name: str, count: int, extractor: str) -> str:
    """`fid` of 50,000 samples, `fid@10k` of 10,000; a probe's figures always have its own name."""
    if extractor == PROBE:
        return {"fid": "fd_probe"}.get(name, f"{name}_probe")
    if count == FULL:
        return name
    return f"{name}@{count // 1000}k" if count % 1000 == 0 else f"{name}@{count}"
