"""The alignment loss: of every layout alike, on real tokens alone; and what teachers are shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from genfound.alignment import Alignment, Teacher, TeacherFeatures, spatially_normalised
from genfound.alignment.base import token_features
from genfound.batch import Batch
from genfound.data.packing.batch_plan import MicroBatch
from genfound.layouts import Dense, Layout, Packed, Padded
from genfound.objectives.base import Losses
from genfound.rng import Rng
from tests.helpers import small_nit

GRIDS = [(3, 5), (4, 2), (1, 4)]
LAYOUTS = {
    "packed": Packed(1), "filled": Packed(1, max_tokens=40, max_images=5, filler_label=9), "padded": Padded(1),
    "longer": Padded(1, max_tokens=20),
}  # fmt: skip


def alignment(projector: str = "mlp", **options: object) -> Alignment:
    defaults = {"width": 6, "widths": {"a": 4}, "weight": 0.5, "depth": 1, "hidden": 7, "kernel": 3}
    built = Alignment(projector=projector, **{**defaults, **options})  # type: ignore[arg-type]
    built.initialise(Rng(0))
    return built


def maps(grids: Sequence[tuple[int, int]], channels: int, seed: int = 0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(channels, *grid, generator=draw) for grid in grids]


def laid_out(layout: Layout, grids: Sequence[tuple[int, int]]) -> tuple[Tensor, Batch]:
    """Hidden tokens of images, and the batch with what a teacher sees in them."""
    batch = layout.to_batch(maps(grids, 1), torch.zeros(len(grids), dtype=torch.long))
    hidden = token_features(maps(grids, 6, 1), layout)
    return hidden, replace(batch, features=(token_features(maps(grids, 4, 2), layout),))


def alone(aligned: Alignment, hidden: Tensor, target: Tensor) -> Tensor:
    """1 - cosine similarity of one image, by the definition; (D, h, w) and (Z, h, w)."""
    (projector,) = aligned.projectors
    if hasattr(projector, "kernel"):
        out = nn.functional.conv2d(hidden[None], projector.weight, projector.bias, padding=projector.kernel // 2)[0]
    else:
        out = nn.Sequential(*projector)(hidden.flatten(1).T).T.view(-1, *hidden.shape[1:])
    return (1 - nn.functional.cosine_similarity(out, target, dim=0)).mean()


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("projector", ["mlp", "linear", "conv"])
def test_every_image_is_as_if_it_were_alone(projector: str, name: str) -> None:
    aligned, layout = alignment(projector, kernel=3), LAYOUTS[name]
    hidden, batch = laid_out(layout, GRIDS)
    hidden.requires_grad_()
    found = aligned(hidden, batch)
    each = [h.requires_grad_() for h in maps(GRIDS, 6, 1)]
    expected = torch.stack([alone(aligned, h, z) for h, z in zip(each, maps(GRIDS, 4, 2), strict=True)])
    torch.testing.assert_close(found[batch.real], expected)
    assert (found[~batch.real] == 0).all()
    ours = torch.autograd.grad(found.sum(), hidden)[0]
    wanted = token_features(list(torch.autograd.grad(expected.sum(), each)), layout)
    torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize("projector", ["mlp", "conv"])
def test_dense_images_too(projector: str) -> None:
    aligned, grids = alignment(projector, kernel=5), [(3, 4)] * 2
    found = aligned(*laid_out(Dense(1, max_images=3), grids))
    pairs = zip(maps(grids, 6, 1), maps(grids, 4, 2), strict=True)
    torch.testing.assert_close(found, torch.stack([*(alone(aligned, h, z) for h, z in pairs), torch.tensor(0.0)]))


def test_the_tokens_are_those_that_leave_the_block_of_this_number() -> None:
    net = small_nit(depth=3)
    batch = Packed(1).to_batch(maps(GRIDS, 4), torch.zeros(3, dtype=torch.long))
    seen: list[Tensor] = []
    net.blocks[1].register_forward_hook(lambda block, inputs, out: seen.append(out))
    aligned = alignment(width=32, depth=2)
    with aligned.watching(net, batch):
        net(batch, torch.full((3,), 0.5))
    assert aligned._hidden is seen[0]
    net(batch, torch.full((3,), 0.5))
    assert aligned._hidden is seen[0], "the network is watched no more"


def test_losses_have_both_parts_and_their_weight() -> None:
    aligned = alignment(weight=0.25)
    hidden, batch = laid_out(LAYOUTS["packed"], GRIDS)
    aligned._hidden = hidden
    before = Losses(torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3))
    after = aligned.added(before, batch)
    assert torch.equal(after.terms["alignment"], 0.25 * aligned(hidden, batch))
    assert torch.equal(after.total, before.total + after.terms["alignment"])
    assert torch.equal(after.terms["objective"], before.total)


def test_without_features_nothing_is_added_and_projectors_get_zeros() -> None:
    aligned = alignment()
    hidden, batch = laid_out(LAYOUTS["packed"], GRIDS)
    aligned._hidden = hidden
    losses = aligned.added(Losses(torch.ones(3), torch.zeros(3)), replace(batch, features=()))
    assert torch.equal(losses.total, torch.ones(3))
    losses.total.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in aligned.parameters())


def test_teachers_count_alike() -> None:
    both = alignment(widths={"a": 4, "b": 4})
    hidden, batch = laid_out(LAYOUTS["packed"], GRIDS)
    one, other = alignment(), alignment()
    one.projectors[0], other.projectors[0] = both.projectors
    found = both(hidden, replace(batch, features=batch.features * 2))
    torch.testing.assert_close(found, (one(hidden, batch) + other(hidden, batch)) / 2)


def test_spatial_normalisation_takes_a_share_of_the_mean_away() -> None:
    features = torch.stack(maps([(3, 4)] * 2, 5)) + 2
    for alpha in (0.6, 1.0):
        found = spatially_normalised(features, alpha)
        torch.testing.assert_close(found.flatten(2).std(dim=2), torch.ones(2, 5), atol=1e-5, rtol=0)
        left = (1 - alpha) * features.mean((2, 3)) / features.flatten(2).std(dim=2)
        torch.testing.assert_close(found.mean((2, 3)), left, atol=1e-5, rtol=1e-4)


def test_an_image_of_one_token_has_no_spread() -> None:
    features = torch.tensor([1.0, -2.0, 3.0]).view(1, 3, 1, 1)
    torch.testing.assert_close(spatially_normalised(features, 0.6), features * 0.4e6)
    assert not spatially_normalised(features, 1.0).any()


class Means(Teacher):
    """The mean colour of each token."""

    width = 3
    calls = 0

    def __call__(self, images: Tensor, rows: int, columns: int) -> Tensor:
        Means.calls += 1
        return nn.functional.adaptive_avg_pool2d(images.float(), (rows, columns))


def test_teachers_see_each_image_in_its_place() -> None:
    sizes = [(6, 10), (8, 4), (6, 10)]
    images = [(torch.rand(3, *size, generator=torch.Generator().manual_seed(i)) * 255).byte() for i, size in
              enumerate(sizes)]  # fmt: skip
    features = TeacherFeatures({"means": Means, "again": Means}, "none", 0.6, 1, None)
    Means.calls = 0
    found = features(images, LAYOUTS["filled"], 2, torch.device("cpu"))
    assert len(found) == 2 and torch.equal(*found) and Means.calls == 4, "images of one size go together"
    tokens = [nn.functional.avg_pool2d(image.float(), 2).flatten(1).T for image in images]
    torch.testing.assert_close(found[0], torch.cat([*tokens, torch.zeros(2, 3)]))


def test_some_steps_are_aligned() -> None:
    features = TeacherFeatures({}, "none", 0.6, every=3, until=100)
    micros = [MicroBatch(0, (), (), 0, step, 1.0, 30 * (step + 1)) for step in range(6)]
    assert [features.aligned(micro) for micro in micros] == [True, False, False, False, False, False]
    assert [replace(features, until=None).aligned(micro) for micro in micros] == [True, False, False] * 2
