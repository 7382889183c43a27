from __future__ import annotations

import pytest
from torch.utils.data import Dataset

from genfound.data.workers import read_ahead


class Numbers(Dataset[int]):
    def __getitem__(self, key: int) -> int:
        if key == 3:
            raise FileNotFoundError(2, "no such file", "three.jpg")
        if key > 3:
            raise ValueError(f"{key}.jpg is damaged")
        return 10 * key


@pytest.mark.parametrize("workers", [0, 2])
def test_items_come_in_the_order_of_the_keys_and_errors_as_they_were(workers: int) -> None:
    items = read_ahead(Numbers(), (key for key in (2, 0, 1, 5)), workers)
    assert [next(items) for _ in range(3)] == [20, 0, 10]
    with pytest.raises(ValueError, match=r"^5\.jpg is damaged$"):
        next(items)
    with pytest.raises(FileNotFoundError, match=r"no such file: 'three\.jpg'"):
        next(read_ahead(Numbers(), [3], workers))
