"""Experts that several processes share compute what whole ones compute."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from genfound.layers.initial import local
from genfound.layers.moe import MixtureOfExperts
from genfound.rng import Rng
from genfound.runtime import expert_parallel
from tests.distributed.test_devices import free_port
from tests.distributed.test_fsdp import spawn

PROCESSES, EXPERTS, WIDTH, HIDDEN, CHOICES = 4, 8, 16, 24, 2
DTYPES = {torch.float32: 1e-6, torch.bfloat16: 1e-2}
"""Of the arithmetic -> how far results are apart, relative to their norm."""

LAWS = {"spread": None, "one": 5, "first": 0}
"""Of routers: as they are, or an expert that is the first choice of all tokens; then most processes have no rows."""


def mixture(favourite: int | None) -> MixtureOfExperts:
    """With weights that are the same in all processes."""
    choices = CHOICES if favourite is None else 1
    layer = MixtureOfExperts(WIDTH, HIDDEN, EXPERTS, choices, False, 0, True)
    with torch.no_grad():
        for number, parameter in enumerate(layer.parameters()):
            parameter.copy_(Rng(3, "weights", number).normal("values", parameter.shape) / 4)
        if favourite is not None:
            layer.gate.weight.zero_()[favourite] = 1
    return layer


def tokens(rank: int) -> Tensor:
    """(B, N, D), as many as this process has; positive."""
    return Rng(4, "tokens", rank).uniform("values", (2, 3 + 2 * rank, WIDTH))


def outcome(layer: MixtureOfExperts, ranks: list[int], dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs for the tokens of these processes and the sum of gradients, of inputs and weights."""
    outputs, inputs = [], []
    for rank in ranks:
        x = tokens(rank).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            out, _ = layer(x)
        (out * Rng(5, "upstream", rank).normal("values", out.shape)).sum().backward()
        outputs.append(out.detach())
        inputs.append(x.grad)
    return [*outputs, *inputs], {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}


def close(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> None:
    assert (ours - theirs).norm() <= DTYPES[dtype] * theirs.norm()


def sharing(rank: int, port: int, folder: Path) -> None:
    """One of four processes, of which each holds a part of the experts, in copies for 4, 2 and 1."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=PROCESSES)
    for share in (4, 2):
        mesh = init_device_mesh("cpu", (PROCESSES // share, share), mesh_dim_names=("replicas", "experts"))
        for favourite in LAWS.values():
            for dtype in DTYPES:
                compare(rank, mixture(favourite), mixture(favourite), mesh, dtype)
    (folder / str(rank)).touch()


def compare(rank, whole, shared, mesh, dtype) -> None:  # type: ignore[no-untyped-def]
    divided = expert_parallel.divide(shared, mesh, MixedPrecisionPolicy())
    share, copies = mesh["experts"].size(), mesh["replicas"].size()
    assert divided == set(shared.experts.parameters()) and isinstance(shared.experts, FSDPModule) == (copies > 1)
    for parameter in divided:
        assert isinstance(parameter, DTensor) and parameter.to_local().shape[0] == EXPERTS // share
        assert local(parameter).numel() * PROCESSES == parameter.numel()
    own, grads = outcome(shared, [rank], dtype)
    expected, sums = outcome(whole, list(range(PROCESSES)), dtype)
    close(own[0], expected[rank], dtype)
    close(own[1], expected[PROCESSES + rank], dtype)
    for name in ("experts.gate_up", "experts.down"):
        close(grads[name].full_tensor(), sums[name] / PROCESSES, dtype)
        assert (grads[name].full_tensor() == 0).flatten(1).all(dim=1).equal((sums[name] == 0).flatten(1).all(dim=1))


@pytest.mark.slow
def test_outputs_and_gradients_are_those_of_whole_experts(tmp_path: Path) -> None:
    spawn(sharing, free_port(), tmp_path, processes=PROCESSES)
    assert len(list(tmp_path.iterdir())) == PROCESSES
