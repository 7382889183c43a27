from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn

from genfound import build
from genfound.backbones.base import Backbone, TokenSpec
from genfound.layers.initial import Draw
from genfound.rng import Rng
from genfound.tokenizers.base import LatentSpec
from tests.test_models import TINY, composed

configuration = cache(composed)


def built(model: str, classes: int = 7) -> Backbone:
    config = configuration(f"model={model}")
    return build.net({**config, "model": {**config["model"], "depth": 1}}, LatentSpec(4, 8), classes)


def differing(one: Backbone, other: Backbone) -> set[str]:
    theirs = dict(other.named_parameters())
    return {name for name, p in one.named_parameters() if not torch.equal(p, theirs[name])}


@pytest.mark.parametrize("model", TINY)
def test_a_parameter_does_not_depend_on_the_others_nor_on_global_generators(model: str) -> None:
    net = built(model)
    torch.manual_seed(5)
    embeddings = {name: module for name, module in net.named_modules() if isinstance(module, nn.Embedding)}
    tables = {f"{name}.weight" for name, module in embeddings.items() if module.num_embeddings > 1}  # of classes
    assert embeddings and differing(net, built(model, classes=9)) == tables
    state = torch.get_rng_state()
    assert not differing(net, built(model))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("model", TINY)
def test_values_come_from_initialise_alone(model: str) -> None:
    """Also in a network that has been trained, or was built on meta and got memory later."""
    net = built(model)
    with torch.device("meta"):
        late = built(model)
    assert all(p.is_meta for p in late.parameters())
    late.to_empty(device="cpu")
    for other in (late, built(model)):
        for p in other.parameters():
            nn.init.constant_(p, torch.nan)
        other.initialise(Rng(0, "initialise"))
        assert not differing(net, other)


def test_every_drawn_parameter_has_a_stream_of_its_own() -> None:
    """Equal shapes and laws, other values; another seed changes all of them."""
    net = nn.ModuleList(nn.Linear(3, 3) for _ in range(50))
    firsts = []
    for seed in (0, 1):
        draw = Draw(net, Rng(seed))
        for p in net.parameters():
            draw(nn.init.normal_, p)
            firsts.append(p.flatten()[0].item())
    assert len(set(firsts)) == 200


def test_anchor() -> None:
    """A change of these numbers changes every new run."""
    net = built("nit_tiny")
    first = dict(net.named_parameters())["blocks.0.attn.qkv.weight"].flatten()[:3]
    torch.testing.assert_close(first, torch.tensor([-0.0903413, -0.0706786, -0.0813434]))
    torch.testing.assert_close(
        net.y_embedder.embedding_table.weight[0, :3], torch.tensor([-0.0219369, 0.0151876, -0.0142927])
    )


class Forgetful(Backbone):
    """A backbone with a parameter that only its constructor sets."""

    layouts = ("dense",)

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.token_spec = TokenSpec(channels, 1)
        self.null_label = num_classes
        self.known = nn.Linear(3, 3)
        self.scale = nn.Parameter(torch.ones(3))


class Complete(Forgetful):
    def initialise(self, rng: Rng | None = None) -> None:
        super().initialise(rng)
        nn.init.ones_(self.scale)


def test_a_backbone_that_leaves_a_parameter_unset_is_refused() -> None:
    with torch.device("meta"):
        nets = Forgetful(4, 7), Complete(4, 7)
    with pytest.raises(ValueError, match=r"Forgetful\.initialise must set every parameter and buffer, also scale"):
        nets[0].materialise(Rng(0))
    nets[1].materialise(Rng(0))
    assert nets[1].scale.tolist() == [1, 1, 1]
    assert 0 < nets[1].known.weight.abs().max() <= 1


@pytest.mark.gpu
def test_a_network_on_a_gpu_starts_as_one_on_the_cpu() -> None:
    def weight(device: str) -> Tensor:
        layer = nn.Linear(30, 30, device=device)
        Draw(layer, Rng(0))(nn.init.xavier_uniform_, layer.weight)
        return layer.weight.detach().cpu()

    assert torch.equal(weight("cpu"), weight("cuda"))
