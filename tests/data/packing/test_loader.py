from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch

from genfound.data.images.pixels import normalised, to_picture, to_uint8
from genfound.data.packing.batch_plan import MicroBatch, Plan
from genfound.data.packing.collate import Collate
from genfound.data.packing.loader import MicroBatches, TrainLoader
from genfound.data.packing.order import Order
from genfound.data.packing.packer import Packer
from genfound.layouts import Packed
from genfound.rng import Rng
from genfound.tokenizers import PixelTokenizer
from tests.data.images.test_shapes import shapes


def micro(number: int, *indices: int) -> MicroBatch:
    return MicroBatch(number, indices, indices, 0, 0, 1.0, 0)


def batches(flips: bool = False) -> MicroBatches:
    return MicroBatches(
        shapes(), Collate(PixelTokenizer(), Packed(2, 400, 12), Rng(0)), Rng(0, "train") if flips else None
    )


def test_pixels_survive_the_way_to_tensors_and_back() -> None:
    image = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    tensor = normalised(to_picture(image))
    assert tensor.shape == (3, 16, 16)
    assert (tensor.min(), tensor.max()) == (-1, 1)
    assert np.array_equal(to_uint8(tensor), image)
    assert to_uint8(torch.full((3, 1, 1), 7.0)).max() == 255


def test_bytes_are_rounded_or_cut() -> None:
    between = torch.full((3, 1, 1), 2 * 100.7 / 255 - 1)
    assert to_uint8(between, "round").ravel().tolist() == [101] * 3
    assert to_uint8(between, "truncate").ravel().tolist() == [100] * 3
    with pytest.raises(ValueError, match=r"sample\.uint8=floor is unknown; choose round or truncate"):
        to_uint8(between, "floor")


def test_a_micro_batch_holds_its_images_in_order() -> None:
    source, loaded = shapes(), batches()
    batch, plan = loaded[micro(0, 7, 3, 11)]
    assert plan.indices == (7, 3, 11)
    assert batch.y[:3].tolist() == source.labels[[7, 3, 11]].tolist()
    for index, latent in zip((7, 3, 11), loaded.assembly.layout.to_latents(batch.x, batch), strict=True):
        assert np.array_equal(to_uint8(latent), source.image(index))


def test_half_of_the_images_are_mirrored_by_micro_batch() -> None:
    flipped, plain = batches(flips=True), batches()
    mirrored = []
    for number in range(12):
        one, same = flipped[micro(number, 1, 2, 3, 4)][0], flipped[micro(number, 1, 2, 3, 4)][0]
        assert torch.equal(one.x, same.x)
        original = plain[micro(0, 1, 2, 3, 4)][0]
        both = (flipped.assembly.layout.to_latents(batch.x, batch) for batch in (one, original))
        for ours, before in zip(*both, strict=True):
            mirror = torch.equal(ours, before.flip(-1))
            assert mirror or torch.equal(ours, before)
            mirrored.append(mirror)
    assert 12 <= sum(mirrored) <= 36


def loader(workers: int, rank: int = 0, ranks: int = 1) -> TrainLoader:
    source = shapes()
    tokens = (source.sizes // 2).prod(axis=1)
    order = Order(len(tokens), 0)
    plan = Plan(order, tokens, Packer(lambda k: int(tokens[order[k]]), 400, 12), 4, "image", 0)
    return TrainLoader(batches(), plan, rank, ranks, workers, pin_memory=False)


def test_workers_change_nothing_and_state_continues() -> None:
    alone, helped = (list(islice(loader(workers), 12)) for workers in (0, 2))
    for (a, m), (b, n) in zip(alone, helped, strict=True):
        assert m == n
        assert torch.equal(a.x, b.x)
    first = loader(0)
    list(islice(first, 8))
    resumed = loader(0)
    resumed.plan.restore(first.plan.state(2))
    assert [m for _, m in islice(resumed, 4)] == [m for _, m in alone[8:12]]
    assert first.waited > 0


@pytest.mark.slow
def test_two_passes_through_kills_other_ranks_and_other_workers_show_every_image_twice() -> None:
    """Killed four times, on 1, 2, then 1 ranks with 0, 2 and 4 workers: the steps of an untouched run."""
    per_step, both_passes = 4, 2 * len(shapes().labels)
    untouched = list(islice(loader(0).plan.steps(), 60))
    steps: list[list[MicroBatch]] = []
    state, done = None, 0
    for ranks, workers, wanted in ((1, 0, 3), (2, 2, 4), (2, 0, 1), (1, 4, 2), (1, 2, len(untouched))):
        loaders = [loader(workers, rank, ranks) for rank in range(ranks)]
        for one in loaders:
            if state is not None:
                one.plan.restore(state)
        count = min(wanted, len(untouched) - done)
        shares = [[micro for _, micro in islice(one, count * per_step // ranks)] for one in loaders]
        for step in range(count):
            own = [share[step * per_step // ranks : (step + 1) * per_step // ranks] for share in shares]
            steps.append(sorted((m for part in own for m in part), key=lambda m: m.number))
        done += count
        state = loaders[0].plan.state(done)
    assert [[m.indices for m in step] for step in steps] == [[m.indices for m in step] for step in untouched]
    positions = sorted(place for step in steps for micro in step for place in micro.positions)
    assert positions[:both_passes] == list(range(both_passes))
