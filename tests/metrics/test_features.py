from pathlib import Path

import numpy as np
import pytest
import torch

from genfound.metrics.features import BATCH, FeatureStore
from genfound.metrics.frechet import Moments
from tests.image_sets import Averages, Pictures


def test_they_are_whole_whoever_computes_them(tmp_path: Path) -> None:
    images, extractor = Pictures([(5, 6)] * 150), Averages()
    alone, shared = FeatureStore(tmp_path / "alone", 150), FeatureStore(tmp_path / "shared", 150)
    alone.extract(images, extractor)
    shared.extract(images, extractor, rank=1, ranks=2)
    assert not shared.complete and alone.complete
    shared.extract(images, extractor, rank=0, ranks=2)
    assert torch.equal(alone.column("pool"), shared.column("pool"))
    assert torch.equal(alone.column("pool", limit=70), alone.column("pool")[:70])
    gaussian = Moments.of(alone.column("pool")).gaussian()
    assert torch.equal(alone.gaussian("pool", torch.device("cpu")).covariance, gaussian.covariance)


def test_only_what_is_missing_is_computed(tmp_path: Path) -> None:
    images, extractor = Pictures([(5, 6)] * 200), Averages()
    features = FeatureStore(tmp_path, 200)
    features.extract(images, extractor)
    before = features.column("logits")
    list(features.files)[2].unlink()
    features.extract(images, extractor)
    assert extractor.calls == -(-200 // BATCH) + 1
    assert torch.equal(features.column("logits"), before)


def test_sums_go_through_blocks_of_the_same_rows(tmp_path: Path) -> None:
    features = FeatureStore(tmp_path, 4500)
    features.extract(Pictures([(2, 2)] * 4500), Averages())
    assert [len(block) for block in features.blocks("pool")] == [4096, 404]
    rows = features.column("pool").double().numpy()
    gaussian = features.gaussian("pool", torch.device("cpu"))
    np.testing.assert_allclose(gaussian.covariance, np.cov(rows, rowvar=False), rtol=1e-9, atol=1e-12)


def test_features_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    class Broken(Averages):
        def __call__(self, images: list[np.ndarray]) -> dict[str, torch.Tensor]:  # type: ignore[override]
            return {name: value / 0 for name, value in super().__call__(images).items()}

    with pytest.raises(ValueError, match="features pool of the images from number 0 on are not finite"):
        FeatureStore(tmp_path, 10).extract(Pictures([(4, 4)] * 10), Broken())
    assert not list(tmp_path.iterdir())


def test_files_of_another_number_of_images_are_not_taken(tmp_path: Path) -> None:
    images = Pictures([(5, 6)] * 100)
    for count in (100, 70):
        features = FeatureStore(tmp_path, count)
        assert not features.complete
        features.extract(images, Averages())
        assert features.complete and len(features.column("pool")) == count
    with pytest.raises(ValueError, match="holds features of 70 images, not of 100; remove it"):
        FeatureStore(tmp_path, 100).column("pool")


def test_a_damaged_file_is_written_anew(tmp_path: Path) -> None:
    features = FeatureStore(tmp_path, 70)
    features.extract(Pictures([(5, 6)] * 70), Averages())
    whole = features.column("pool")
    file = next(iter(features.files))
    file.write_bytes(file.read_bytes()[:500])
    assert not features.complete
    features.extract(Pictures([(5, 6)] * 70), Averages())
    assert torch.equal(features.column("pool"), whole)
