import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from genfound.metrics import extractor
from genfound.metrics.extractor import COUNTED, Inception
from genfound.metrics.inception import InceptionV3
from genfound.metrics.resize import tf1_resize
from tests.golden.runner import COMMITTED


@pytest.fixture(scope="module")
def net() -> InceptionV3:
    torch.manual_seed(0)
    return InceptionV3()


@pytest.fixture(scope="module")
def weights(net: InceptionV3, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file like the public one: a plain state dict without counters."""
    file = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save({k: v for k, v in net.state_dict().items() if not k.endswith(COUNTED)}, file)
    return file


def images(*sizes: tuple[int, int]) -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    return [draw.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


def test_it_has_the_names_and_shapes_of_the_public_file(net: InceptionV3) -> None:
    fixture = json.loads((COMMITTED / "metrics/inception_v3.json").read_text())
    official = {key: tuple(shape) for key, shape in fixture["parameters"] + fixture["buffers"]}
    ours = {key: tuple(value.shape) for key, value in net.state_dict().items() if not key.endswith(COUNTED)}
    assert ours == official and len(ours) == 5 * 94 + 2
    assert sum(p.numel() for p in net.parameters()) == 23_850_960


@torch.no_grad()
def test_spatial_features_are_seven_channels_in_row_column_channel_order(net: InceptionV3) -> None:
    seen: list[Tensor] = []
    handle = net.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, out: seen.append(out))
    pool, spatial, logits = net(torch.from_numpy(np.stack(images((20, 31), (20, 31)))).permute(0, 3, 1, 2))
    handle.remove()
    assert pool.shape == (2, 2048) and spatial.shape == (2, 2023) and logits.shape == (2, 1008)
    assert spatial[1, (4 * 17 + 9) * 7 + 5] == seen[0][1, 5, 4, 9]
    torch.testing.assert_close(logits, pool @ net.fc.weight.T)


def test_it_never_trains(net: InceptionV3) -> None:
    net.train()
    assert not any(module.training for module in net.modules())
    assert not any(p.requires_grad for p in net.parameters())


def test_images_of_several_sizes_give_what_each_gives_alone(weights: Path) -> None:
    extractor = Inception(weights, torch.device("cpu"))
    batch = images((16, 16), (40, 24))
    together = extractor(batch)
    for place, image in enumerate(batch):
        for name, value in extractor([image]).items():
            torch.testing.assert_close(value[0], together[name][place], rtol=1e-4, atol=1e-5)


def test_the_same_tensors_have_the_same_hash_with_and_without_counters(net: InceptionV3, weights: Path) -> None:
    other = weights.with_name("with_counters.pth")
    torch.save(net.state_dict(), other)
    before = torch.get_rng_state()
    hashes = {Inception(file, torch.device("cpu")).hash for file in (weights, other)}
    assert len(hashes) == 1
    assert torch.equal(torch.get_rng_state(), before)


def test_missing_and_foreign_weights_are_named(tmp_path: Path, weights: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"download weights-inception-2015-12-05-6726825d.pth from https://github"
    ):
        Inception(tmp_path / "none.pth", torch.device("cpu"))
    foreign = tmp_path / "foreign.pth"
    torch.save({"fc.weight": torch.zeros(10, 4)}, foreign)
    with pytest.raises(ValueError, match=r"foreign.pth does not fit InceptionV3: \d+ missing"):
        Inception(foreign, torch.device("cpu"))
    cut = tmp_path / "cut.pth"
    cut.write_bytes(weights.read_bytes()[:10_000])
    with pytest.raises(ValueError, match=r"cut.pth is damaged"):
        Inception(cut, torch.device("cpu"))


def test_the_public_files_format_is_read(net: InceptionV3, weights: Path, tmp_path: Path) -> None:
    torch.save(net.state_dict(), tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    assert Inception(tmp_path / "legacy.pth", torch.device("cpu")).hash == Inception(weights, torch.device("cpu")).hash


def test_a_resize_to_the_same_size_changes_nothing() -> None:
    image = torch.randint(0, 256, (2, 3, 7, 5), dtype=torch.uint8)
    assert torch.equal(tf1_resize(image, 7, 5), image.float())


def test_doubling_puts_values_between_and_repeats_the_last() -> None:
    row = torch.tensor([0, 10, 40], dtype=torch.uint8).reshape(1, 1, 1, 3)
    assert tf1_resize(row, 1, 6).flatten().tolist() == [0, 5, 10, 25, 40, 40]


def test_reducing_takes_pixels_without_averaging() -> None:
    image = torch.arange(64, dtype=torch.uint8).reshape(1, 1, 8, 8)
    assert torch.equal(tf1_resize(image, 4, 4), image[:, :, ::2, ::2].float())


def test_the_public_weights_are_downloaded_once_and_only_whole(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served, folder = tmp_path / "served.pth", tmp_path / "weights"
    monkeypatch.setattr(extractor, "SOURCES", (served.as_uri(), "elsewhere"))
    with pytest.raises(ValueError, match=r"served\.pth cannot be downloaded: .*No such file.*; inception=false"):
        extractor.download(folder)
    assert not folder.exists()
    served.symlink_to(weights)
    file = extractor.download(folder)
    assert file == folder / extractor.WEIGHTS and file.read_bytes() == weights.read_bytes()
    served.unlink()
    assert extractor.download(folder) == file
    served.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="is damaged"):
        extractor.download(tmp_path / "cut")
    assert not list((tmp_path / "cut").iterdir())
