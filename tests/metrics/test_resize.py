import torch

from genfound.metrics.resize import tf1_resize


def test_the_same_size_changes_nothing() -> None:
    image = torch.randint(0, 256, (2, 3, 7, 5), dtype=torch.uint8)
    assert torch.equal(tf1_resize(image, 7, 5), image.float())


def test_doubling_puts_values_between_and_repeats_the_last() -> None:
    row = torch.tensor([0, 10, 40], dtype=torch.uint8).reshape(1, 1, 1, 3)
    assert tf1_resize(row, 1, 6).flatten().tolist() == [0, 5, 10, 25, 40, 40]


def test_reducing_takes_pixels_without_averaging() -> None:
    image = torch.arange(64, dtype=torch.uint8).reshape(1, 1, 8, 8)
    assert torch.equal(tf1_resize(image, 4, 4), image[:, :, ::2, ::2].float())
