from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from genfound.metrics.compute import (
    check_convention,
    check_reference,
    compute,
    depends_on_order,
    metric_name,
)
from genfound.metrics.features import FeatureStore
from genfound.metrics.reference_stats import Reference, read_reference, write_reference
from tests.image_sets import Averages, Pictures

CPU = torch.device("cpu")


class AverageProbe(Averages):
    name = "probe"

    def __call__(self, images: Sequence[np.ndarray]) -> dict[str, Tensor]:
        return {key: value for key, value in super().__call__(images).items() if key != "spatial"}


def prepared(folder: Path, extractor: Averages, count: int = 60) -> tuple[FeatureStore, Reference]:
    samples, real = Pictures([(6, 6)] * count, 0), Pictures([(6, 6)] * 80, 1)
    features = [FeatureStore(folder / name, len(images)) for name, images in (("s", samples), ("r", real))]
    for found, images in zip(features, (samples, real), strict=True):
        found.extract(images, extractor)
    write_reference(folder / "ref.npz", features[1], real, extractor, {})
    return features[0], read_reference(folder / "ref.npz", extractor)


def test_adms_five_figures(tmp_path: Path) -> None:
    features, reference = prepared(tmp_path, Averages())
    figures = compute(features, reference, Averages(), "adm", None, CPU)
    assert list(figures) == [f"{name}@60" for name in ("fid", "sfid", "inception_score", "precision", "recall")]
    half = compute(features, reference, Averages(), "adm_half", None, CPU)
    assert half["fid@60"] == figures["fid@60"]
    assert half["precision@60"] == pytest.approx(figures["precision@60"], abs=0.1)


def test_torch_fidelitys_figures_need_their_thousand_images(tmp_path: Path) -> None:
    features, reference = prepared(tmp_path, Averages())
    with pytest.raises(ValueError, match="kid: subsets of 1,000 images"):
        compute(features, reference, Averages(), "torch_fidelity", None, CPU)


def test_a_probes_figures_bear_its_name(tmp_path: Path) -> None:
    extractor = AverageProbe()
    features, reference = prepared(tmp_path, extractor)
    right = features.column("logits").argmax(dim=1).numpy()
    figures = compute(features, reference, extractor, "adm", np.where(np.arange(60) < 45, right, -1), CPU)
    assert list(figures) == ["fd_probe", "accuracy_probe", "precision_probe", "recall_probe"]
    assert figures["accuracy_probe"] == 0.75
    assert "accuracy_probe" not in compute(features, reference, extractor, "adm", None, CPU)


@pytest.mark.parametrize(
    ("count", "name"), [(50_000, "fid"), (10_000, "fid@10k"), (2048, "fid@2048"), (50_176, "fid@50176")]
)
def test_a_reduced_count_is_in_the_name(count: int, name: str) -> None:
    assert metric_name("fid", count, "inception") == name
    assert metric_name("fid", count, "probe") == "fd_probe"


def test_fewer_images_than_features_are_refused(tmp_path: Path) -> None:
    features, reference = prepared(tmp_path, Averages(), count=5)
    with pytest.raises(ValueError, match="n: 5 images are fewer than the 6 features of inception; their covariance"):
        compute(features, reference, Averages(), "adm", None, CPU)


def test_an_unknown_convention_is_refused(tmp_path: Path) -> None:
    features, reference = prepared(tmp_path, Averages())
    with pytest.raises(ValueError, match="convention=clean is unknown; choose one of adm, adm_half, torch_fidelity"):
        compute(features, reference, Averages(), "clean", None, CPU)


def test_a_probe_has_its_own_convention() -> None:
    with pytest.raises(ValueError, match="convention=torch_fidelity is one of Inception's figures, and a probe has"):
        check_convention("torch_fidelity", "probe")


def test_a_reference_of_too_few_points_is_refused(tmp_path: Path) -> None:
    features, reference = prepared(tmp_path, Averages())
    assert reference.points is not None
    few, enough = (replace(reference, points=reference.points[:count]) for count in (3, 4))
    with pytest.raises(ValueError, match="reference: 3 images are too few for precision and recall, which need 3 near"):
        check_reference(few, Averages(), "adm")
    check_reference(enough, Averages(), "adm")
    check_reference(replace(reference, points=None), Averages(), "torch_fidelity")
    assert "recall@60" in compute(features, enough, Averages(), "adm", None, CPU)


def test_only_a_divided_score_and_subsets_depend_on_the_order() -> None:
    assert not depends_on_order("adm", 5000) and depends_on_order("adm", 5001)
    assert depends_on_order("torch_fidelity", 2048) and not depends_on_order("probe", 50_000)
