from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from genfound.data.images.base import PictureSource
from genfound.data.images.imagenet import ImageTree
from genfound.data.images.views import Entries
from genfound.encoding import shard_plan
from genfound.encoding.shard_plan import EncodeDataset, Split
from tests.stores import native, tree


def part(sizes: list[list[int]], images: list[int] | None = None) -> Split:
    every = np.array(range(len(sizes)) if images is None else images)
    entries = Entries(every, np.zeros_like(every), np.array(sizes))
    return Split(cast(PictureSource, None), entries, np.zeros(int(every.max()) + 1, dtype=np.int64))


def borders(whole: Split, *arguments: Any) -> list[tuple[int, int]]:
    shards = whole.shards("train", *arguments)
    assert [shard.number for shard in shards] == list(range(len(shards)))
    return [(shard.first, shard.end) for shard in shards]


def test_a_shard_has_so_many_images_with_all_their_entries() -> None:
    assert borders(part([[8, 8]] * 7), 3, 1.0) == [(0, 3), (3, 6), (6, 7)]
    assert borders(part([[8, 8]] * 7, [0, 0, 0, 1, 3, 3, 4]), 2, 1.0) == [(0, 4), (4, 6), (6, 7)]


def test_a_shard_has_no_more_bytes_than_it_may_unless_one_image_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_plan, "LARGEST", 600)
    sizes = [[10, 10], [10, 10], [10, 20], [30, 30], [5, 5], [10, 10]]
    assert borders(part(sizes), 100, 2.0) == [(0, 2), (2, 3), (3, 4), (4, 6)]
    assert borders(part(sizes), 100, 1.5) == [(0, 3), (3, 4), (4, 6)]
    assert borders(part(sizes), 1, 2.0) == [(i, i + 1) for i in range(6)]
    assert borders(part(sizes), 100, 0.1) == [(0, 6)]


def test_reading_says_which_images_are_shown_by_others(tmp_path: Path) -> None:
    root = tree(tmp_path / "images", 9)
    broken = root / "train/n01/004.png"
    broken.write_bytes(broken.read_bytes()[:60])
    options = {"views": native(), "holdout": None, "max_pixels": None, "check": "header", "split": "train"}
    source = ImageTree(root=str(root), index=str(tmp_path / "index"), **options)  # type: ignore[arg-type]
    whole = Split.of(source)
    batches = [batch for shard in whole.shards("train", 100, 1.0) for batch in whole.batches(shard, 10**6)]
    read = [EncodeDataset({"train": whole})[batch] for batch in batches]
    replaced = {name: other for _, _, found in read for name, other in found.items()}
    assert replaced == {"n01/004.png": "n01/007.png"}
    assert sum(len(pictures) for _, (pictures,), _ in read) == 9
    assert torch.equal(whole.read(4), whole.read(4))
