from pathlib import Path

import numpy as np
import pytest
import torch

from genfound.data.images.npz import file_hash
from genfound.metrics.features import FeatureStore
from genfound.metrics.reference_stats import (
    choose_reference,
    given_statistics,
    read_reference,
    reference_note,
    reference_size,
    write_reference,
)
from tests.image_sets import Averages, Pictures


def written(folder: Path, images: Pictures, name: str = "ref.npz") -> Path:
    features = FeatureStore(folder / f"{name}.parts", len(images))
    features.extract(images, Averages())
    write_reference(folder / name, features, images, Averages(), {"from": "test", "view": "as_is"})
    return folder / name


def test_it_has_adms_layout_and_is_read_again(tmp_path: Path) -> None:
    images = Pictures([(6, 8)] * 40)
    file = written(tmp_path, images)
    with np.load(file) as stored:
        assert stored["mu"].shape == (6,) and stored["sigma"].shape == (6, 6)
        assert stored["mu_s"].shape == (4,) and stored["sigma_s"].shape == (4, 4)
        assert np.array_equal(stored["arr_0"], np.stack(images.images))
        pool = Averages()(images.images)["pool"].double().numpy()
        np.testing.assert_allclose(stored["mu"], pool.mean(0), rtol=1e-12)
        np.testing.assert_allclose(stored["sigma"], np.cov(pool, rowvar=False), rtol=1e-9, atol=1e-12)
        mean = stored["mu"]
    reference = read_reference(file, Averages())
    assert torch.equal(reference.gaussians["pool"].mean, torch.tensor(mean)) and "spatial" in reference.gaussians
    assert reference.points is not None and len(reference.points) == 40
    assert reference.note["images"] == 40 and reference.note["size"] == [6, 8]
    assert reference.hash == file_hash(file)


def test_the_hash_is_that_of_the_content(tmp_path: Path) -> None:
    one, two = (written(tmp_path, Pictures([(6, 8)] * 40, seed), f"{seed}.npz") for seed in (1, 2))
    again = written(tmp_path, Pictures([(6, 8)] * 40, 1), "again.npz")
    assert file_hash(one) == file_hash(again) != file_hash(two)


def test_images_of_several_sizes_have_features_and_no_array(tmp_path: Path) -> None:
    file = written(tmp_path, Pictures([(6, 8), (9, 5)] * 20))
    with np.load(file) as stored:
        assert "arr_0" not in stored.files
    reference = read_reference(file, Averages())
    assert reference.points is not None and reference.note["size"] == "mixed"


def adm(file: Path, width: int = 6, **arrays: np.ndarray) -> Path:
    np.savez(file, mu=np.zeros(width, np.float32), sigma=np.eye(width), **arrays)
    return file


def test_adms_files_are_read_and_those_of_other_features_refused(tmp_path: Path) -> None:
    reference = read_reference(adm(tmp_path / "adm.npz"), Averages())
    assert reference.points is None and reference.gaussians["pool"].mean.dtype == torch.float64
    with pytest.raises(ValueError, match="must have mu and sigma of the 6 features"):
        read_reference(adm(tmp_path / "other.npz", width=64), Averages())
    statistics = given_statistics(adm(tmp_path / "both.npz", mu_s=np.zeros(4), sigma_s=np.eye(4)))
    assert statistics is not None and set(statistics) == {"pool", "spatial"}


def test_a_file_of_another_extractor_is_refused(tmp_path: Path) -> None:
    class Other(Averages):
        hash = "of something else"

    class Probe(Averages):
        name = "probe"

    file = written(tmp_path, Pictures([(6, 8)] * 40))
    for extractor in (Other(), Probe()):
        with pytest.raises(ValueError, match="was made with the extractor inception of averages, and this is"):
            read_reference(file, extractor)
    with pytest.raises(ValueError, match="was made with the extractor inception, and this is probe"):
        read_reference(adm(tmp_path / "adm.npz"), Probe())


@pytest.mark.parametrize(
    "broken", [{"sigma": np.eye(5)}, {"sigma": np.full((6, 6), np.nan)}, {"mu": np.array(list("abcdef"))}]
)
def test_damaged_statistics_are_refused(broken: dict[str, np.ndarray], tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", **{"mu": np.zeros(6), "sigma": np.eye(6), **broken})
    with pytest.raises(ValueError, match=r"x.npz: mu, sigma: (statistics of shapes|the statistics hold|<U1 is no)"):
        read_reference(tmp_path / "x.npz", Averages())


def test_statistics_of_any_real_numbers_are_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", mu=np.arange(6, dtype=">f8"), sigma=np.eye(6, dtype=np.float16))
    (tmp_path / "._64x64.npz").touch()
    found = given_statistics(tmp_path / "x.npz")["pool"]
    assert found.mean.tolist() == [0, 1, 2, 3, 4, 5] and found.covariance.trace() == 6


def test_the_reference_of_a_size(tmp_path: Path) -> None:
    for name in ("VIRTUAL_imagenet256_labeled", "VIRTUAL_imagenet512", "mine_160x480"):
        adm(tmp_path / f"{name}.npz")
    adm(tmp_path / "images.npz", arr_0=np.zeros((2, 24, 40, 3), np.uint8))
    expected = {
        (256, 256): "VIRTUAL_imagenet256_labeled", (512, 512): "VIRTUAL_imagenet512", (160, 480): "mine_160x480",
        (480, 160): "VIRTUAL_imagenet256_labeled", (320, 640): "VIRTUAL_imagenet512",
        (480, 640): "VIRTUAL_imagenet512", (256, 512): "VIRTUAL_imagenet256_labeled", (24, 40): "images",
        (1024, 1024): "VIRTUAL_imagenet512",
    }  # fmt: skip
    for size, name in expected.items():
        file, rule = choose_reference(tmp_path, size)
        exact = size in ((256, 256), (512, 512), (160, 480), (24, 40))
        assert (file.stem, rule) == (name, "of this size" if exact else "square, of the nearest area"), size


def test_a_folder_without_a_square_reference(tmp_path: Path) -> None:
    adm(tmp_path / "160x480.npz")
    with pytest.raises(FileNotFoundError, match=r"holds no .npz of 256x256 and none of square images"):
        choose_reference(tmp_path, (256, 256))


def test_a_note_tells_the_size_and_a_hash_in_the_name_does_not(tmp_path: Path) -> None:
    file = written(tmp_path, Pictures([(6, 8)] * 40), "a256b64c.npz")
    mixed = written(tmp_path, Pictures([(6, 8), (9, 5)] * 20), "512.npz")
    assert reference_size(file) == (6, 8) and reference_size(mixed) is None
    names = {"fid_10k_256_v2": (256, 256), "imagenet-64x48-2": (64, 48), "v1-512": (512, 512)}
    for name, size in names.items():
        assert reference_size(adm(tmp_path / f"{name}.npz")) == size
    with pytest.raises(ValueError, match=r"v2\.npz does not tell the size of its images; rename it to v2_HEIGHTxWIDTH"):
        reference_size(adm(tmp_path / "v2.npz"))


def test_two_references_of_one_size_are_both_named(tmp_path: Path) -> None:
    for name in ("a_256", "b_256", "512"):
        adm(tmp_path / f"{name}.npz")
    for size in ((256, 256), (256, 288)):
        with pytest.raises(ValueError, match=r"two files of 256x256, a_256\.npz and b_256\.npz; give the path"):
            choose_reference(tmp_path, size)
    assert choose_reference(tmp_path, (512, 512))[0].stem == "512"


@pytest.mark.parametrize("note", ["[1]", "hello", '{"extractor": 3}', 5.0])
def test_a_foreign_note_is_no_note(note: object, tmp_path: Path) -> None:
    file = adm(tmp_path / "x.npz", note=np.array(note))
    assert reference_note(file) is None
    assert read_reference(file, Averages()).points is None
