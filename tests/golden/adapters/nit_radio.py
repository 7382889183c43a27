"""RADIO, NiT's teacher: features of a small network, and positions of grids of other sizes than the trained one."""

from __future__ import annotations

import torch
from torch import Tensor

from genfound.alignment.radio import PATCH, RADIO, converted
from genfound.runtime.transformers_models import from_state
from tests.golden.adapters import Results, adapter
from tests.golden.adapters.nit import Fixture
from tests.golden.fill import inputs, parameters, unit


class Given(RADIO):
    """RADIO with the weights of a fixture, and with images in [-1, 1], as NiT's data have them."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state
        super().__init__(weights="given")

    def load(self, weights: str) -> object:
        model = from_state("Dinov2WithRegisters", *converted(self.state, weights))
        model.layernorm = torch.nn.Identity()
        return model

    def pixels(self, images: Tensor, height: int, width: int) -> Tensor:
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (self.mean, self.std))
        return ((images.clamp(-1, 1) + 1) / 2 - mean) / std


@adapter("nit", "radio_forward")
@torch.no_grad()
def forward(fixture: Fixture) -> Results:
    """Patch features of all images, one after the other, and their class tokens."""
    teacher, images = Given(parameters(fixture)), inputs(fixture)
    maps = [teacher(x[None], x.shape[1] // PATCH, x.shape[2] // PATCH)[0] for x in images.values()]
    classes = len(fixture["config"]["vit"]["teachers"])
    tokens = [teacher.model(teacher.pixels(x[None], *x.shape[1:])).last_hidden_state[0] for x in images.values()]
    return {
        "summary": torch.cat([of_image[:classes] for of_image in tokens]),
        "spatial_features": torch.cat([features.flatten(1).T for features in maps]),
        "num_cls_tokens": classes,
        "num_registers": teacher.prefix - classes,
    }


@adapter("nit", "radio_pos")
def positions(fixture: Fixture) -> Results:
    """The table of positions for images of several sizes."""
    ((_, shape),) = fixture["parameters"]
    side = round(shape[1] ** 0.5)
    table = torch.from_numpy(unit("pos_embed", shape)).unflatten(1, (side, side)).permute(0, 3, 1, 2)
    teacher = Given.__new__(Given)
    found = {}
    for height, width in fixture["config"]["image_hw"]:
        grid = teacher.resampled(table, height // PATCH, width // PATCH)
        found[f"pos_embed.{height}x{width}"] = grid[0].flatten(1).T
    return found
