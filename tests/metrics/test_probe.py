from pathlib import Path

import numpy as np
import pytest
import torch

from genfound.data.images.sets import Sourced, Subset
from genfound.data.images.shapes import Shapes
from genfound.metrics.probe import HELD_OUT, Probe, _data, is_guessing, probe_key, train_probe

CPU = torch.device("cpu")


def shapes(split: str, images: int = 800) -> Sourced:
    options = {"images": images, "holdout": 100, "sides": [12, 16, 20], "view": "native", "size": 16, "max_tokens": 256}
    return Sourced(Shapes(**options, unit=2, split=split, seed=0))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def probe() -> Probe:
    torch.set_num_threads(1)
    return train_probe(shapes("train"), shapes("val"), 10)


def test_it_learns_the_classes_from_few_images(probe: Probe) -> None:
    assert probe.accuracy is not None and probe.accuracy > 0.6


def test_the_same_images_give_the_same_probe_and_take_no_random_number() -> None:
    before = torch.get_rng_state()
    few = Subset(shapes("train"), np.arange(128))
    hashes = {train_probe(few, shapes("val"), 10).hash for _ in range(2)}
    assert len(hashes) == 1
    assert torch.equal(torch.get_rng_state(), before)


def test_features_are_each_images_own(probe: Probe) -> None:
    images = [shapes("val")[k] for k in range(5)]
    together = probe(images)
    assert together["pool"].shape == (5, probe.width) and together["logits"].shape == (5, 10)
    torch.testing.assert_close(probe(images[3:4])["pool"][0], together["pool"][3], rtol=1e-5, atol=1e-6)


def test_it_is_saved_and_loaded(probe: Probe, tmp_path: Path) -> None:
    probe.save(tmp_path / "p.safetensors")
    again = Probe.load(tmp_path / "p.safetensors", CPU)
    assert (again.hash, again.accuracy) == (probe.hash, probe.accuracy)
    assert [p.name for p in tmp_path.iterdir()] == ["p.safetensors"]


def test_other_files_are_refused(probe: Probe, tmp_path: Path) -> None:
    file = tmp_path / "p.safetensors"
    with pytest.raises(FileNotFoundError, match="extractor_weights="):
        Probe.load(file, CPU)
    probe.save(file)
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"p.safetensors is damaged or is not a probe"):
        Probe.load(file, CPU)


def test_its_name_follows_the_data(probe: Probe) -> None:
    keys = {probe_key(shapes("train", n).key, 10) for n in (100, 101)} | {probe_key(shapes("train", 100).key, 11)}
    assert len(keys) == 3


def test_the_number_of_threads_does_not_change_it() -> None:
    few, hashes = Subset(shapes("train"), np.arange(128)), set()
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        hashes.add(train_probe(few, shapes("val"), 10).hash)
        assert torch.get_num_threads() == threads
    torch.set_num_threads(before)
    assert len(hashes) == 1


@pytest.mark.parametrize(
    ("accuracy", "counts", "guessing"),
    [
        (1.0, [50], True),  # of one class there is nothing to learn
        (0.95, [50, 50], False),
        (0.55, [500, 500], False),
        (0.53, [500, 500], True),
        (1.0, [2, 3], False),
        (0.9, [90, 10], True),  # it always names the larger class
        (0.99, [90, 10], False),
        (0.11, [100] * 10, True),
        (0.15, [100] * 10, False),
        (0.01, [50] * 1000, False),
    ],
)
def test_an_accuracy_is_judged_by_what_guessing_gives(accuracy: float, counts: list[int], guessing: bool) -> None:
    assert is_guessing(accuracy, np.repeat(np.arange(len(counts)), counts)) == guessing


def test_all_classes_are_held_out_also_where_images_are_sorted_by_class() -> None:
    images = shapes("train", 3000)
    _, labels = _data(Subset(images, np.argsort(images.labels, kind="stable")), HELD_OUT)
    assert len(labels) == HELD_OUT and len(labels.unique()) == 10
