"""Two processes sample from a network of which neither ever holds more than a block, each as much as it likes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from genfound import build
from genfound.backbones.base import Backbone
from genfound.evaluation.provenance import network_hash
from genfound.rng import Rng
from genfound.runtime import fsdp
from genfound.runtime.uneven_calls import uneven_calls
from genfound.sampling.pipeline import Pipeline
from genfound.sampling.requests import SampleRequest
from genfound.tokenizers import PixelTokenizer
from tests.distributed.test_devices import free_port
from tests.distributed.test_fsdp import spawn
from tests.helpers import composed

CPU = torch.device("cpu")
DEPTH = 8
REQUESTS = [SampleRequest(label, (16, side), label) for side in (16, 20) for label in range(3)]
MINE = {0: REQUESTS, 1: REQUESTS[:1]}
"""Of each process; dopri5 calls the network as often as each image needs."""


class Casts(TorchDispatchMode):
    """Counts conversions to bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        converts = function is torch.ops.aten._to_copy.default and isinstance(out, Tensor)
        self.count += converts and out.dtype == torch.bfloat16
        return out


def configuration(precision: str, sampler: str) -> dict[str, Any]:
    size = ["model.width=32", f"model.depth={DEPTH}", "model.heads=2", "guidance=cfg", "sample.batch=2"]
    return composed("model=nit_tiny", *size, f"sampler={sampler}", f"trainer.precision={precision}")


def network(config: dict[str, Any]) -> Backbone:
    net = build.net(config, PixelTokenizer.spec, 10)
    with torch.no_grad():
        for number, parameter in enumerate(net.parameters()):
            parameter.copy_(0.2 * Rng(7, "weights", number).normal("values", parameter.shape))
    return net.eval()


def held(net: nn.Module) -> int:
    """Elements of the weights that are whole in this process."""
    return sum(p.numel() for p in net.parameters() if not isinstance(p, DTensor))


def sampling(rank: int, port: int, folder: Path) -> None:
    """One of two processes: what a sharded network draws is what a whole one draws."""
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    for precision, sampler in (("fp32", "dopri5"), ("bf16", "euler")):
        config = configuration(precision, sampler)
        objective = build.objective(config)
        pipeline = Pipeline.from_config(config, objective, PixelTokenizer(), CPU, 2)
        single, sharded, most = network(config), network(config), [0]
        fsdp.shard(sharded, init_device_mesh("cpu", (2,)))
        assert network_hash(sharded, config) == network_hash(single, config)
        for block in sharded.blocks:  # type: ignore[union-attr]
            block.register_forward_hook(lambda *_: most.append(held(sharded)))  # noqa: B023
        with uneven_calls(sharded), Casts() as casts:
            pictures = pipeline.latents(sharded, MINE[rank], seed=3)
        with Casts() as cached:
            expected = pipeline.latents(single, MINE[rank], seed=3)
        for picture, other in zip(pictures, expected, strict=True):
            assert torch.equal(picture, other)
        assert 0 < max(most) < 0.35 * sum(p.numel() for p in single.parameters()) and not held(sharded)
        assert casts.count == cached.count == 0 or casts.count > 2 * cached.count  # no copy outlives its block
    diverging(rank, sharded)
    (folder / str(rank)).touch()


def diverging(rank: int, net: Backbone) -> None:
    """An image that is not finite ends the sampling of one process, not of the other."""
    layout = build.sampling_layout(configuration("fp32", "euler"))
    batch = layout.to_batch([torch.zeros(3, 16, 16)], torch.zeros(1, dtype=torch.long))
    with torch.no_grad():
        if rank == 0:
            with pytest.raises(FloatingPointError), uneven_calls(net):
                raise FloatingPointError
        else:
            with uneven_calls(net):
                assert net(batch, torch.zeros(1)).isfinite().all()


@pytest.mark.slow
def test_a_sharded_network_draws_the_pictures_of_a_whole_one(tmp_path: Path) -> None:
    spawn(sampling, free_port(), tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"0", "1"}
