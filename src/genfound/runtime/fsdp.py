"""Fully sharded data parallelism: every process keeps its part of each tensor, and gathers a block as it is computed.

This is torch's FSDP2 (`torch.distributed.fsdp.fully_shard`) under Lightning's `ModelParallelStrategy`. Checkpoints are
files of one process, in which tensors are whole, or folders to which each process adds its parts; a run may change its
strategy with both. Experts may have a mesh of their own, see `expert_parallel`.
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, empty
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from genfound.layers.initial import whole
from genfound.runtime import checkpoint_io, expert_parallel


class FullyShardedStrategy(ModelParallelStrategy):
    """One mesh of all processes, and one of those that share experts.

    Args:
        save_distributed_checkpoint: checkpoints are folders in which each process writes its part; otherwise the first
            one gathers all tensors and writes a file.
        reduce_dtype: `bf16`: gradients are summed over processes in bfloat16; `None`: in float32, as they are.
        expert_parallel: how many processes share a copy of the experts, and send each other rows of tokens; with 1 they
            are gathered as all other weights.
    """

    lightning_restore_optimizer = True

    def __init__(
        self, save_distributed_checkpoint: bool = False, reduce_dtype: str | None = None, expert_parallel: int = 1
    ) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=save_distributed_checkpoint)
        self.reduce_dtype = {None: None, "bf16": torch.bfloat16}[reduce_dtype]
        self.expert_parallel = expert_parallel
        self.expert_mesh: DeviceMesh | None = None  # replicas, experts

    def setup_environment(self) -> None:
        """Lightning's `auto` is the number of machines."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()
        if (share := self.expert_parallel) > 1:
            shape = (self.world_size // share, share)
            names = ("replicas", "experts")
            self.expert_mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=names)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """With sharded tensors, as all of a checkpoint until it is saved."""
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """With sharded moments."""
        return optimizer.state_dict()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Write a folder together, or a file of whole tensors."""
        if self._save_distributed_checkpoint:
            self.checkpoint_io.save_sharded(checkpoint, Path(filepath))  # type: ignore[attr-defined]
            return
        whole = gathered(checkpoint, self.is_global_zero)
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(whole, filepath)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Every process reads its parts of a folder; it opens a file, and takes its parts later."""
        path = Path(checkpoint_path)
        if not path.is_dir():
            return self.checkpoint_io.load_checkpoint(path, weights_only=weights_only)
        from genfound.runtime.sharded_values import Values

        saved, mesh = checkpoint_io.read(path, parts=()), self.device_mesh["data_parallel"]
        owners = self._owners(saved)

        def part(name: str, shape: Tensor) -> Tensor:
            own = owners.get(name)
            placed = (own.device_mesh, own.placements) if isinstance(own, DTensor) else (mesh, [placement(shape, mesh)])
            return empty(shape.shape, dtype=shape.dtype, device_mesh=placed[0], placements=placed[1])

        return Values(path).filled(saved, part)

    def _owners(self, saved: Mapping[str, Any]) -> dict[str, Tensor]:
        """The weights that own the tensors of a checkpoint, by their names in it: each itself, averages, moments."""
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        found = {f"state_dict.{name}": weight for name, weight in own.items()}
        for decay, names in saved.get("ema", {}).items():
            found |= {f"ema.{decay}.{name}": own[key] for name in names for key in (f"net.{name}", name) if key in own}
        for i, (optimizer, state) in enumerate(zip(self.optimizers, saved["optimizer_states"], strict=False)):
            for number, weight in _numbered(optimizer, state).items():
                found |= {f"optimizer_states[{i}].state.{number}.{key}": weight for key in state["state"][number]}
        return found

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Take this process's part of each weight."""
        assert self.lightning_module is not None
        own, saved = self.lightning_module.state_dict(), checkpoint["state_dict"]
        state = {name: sharded_like(value, own.get(name)) for name, value in saved.items()}
        self.lightning_module.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take this process's part of each moment."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parts = {
                number: {key: sharded_like(value, p) for key, value in saved["state"][number].items()}
                for number, p in _numbered(optimizer, saved).items()
            }
            optimizer.load_state_dict({**saved, "state": parts})


def _numbered(optimizer: Optimizer, saved: Mapping[str, Any]) -> dict[int, Tensor]:
    """The parameters of an optimizer by the numbers that a saved state has of them."""
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {number: p for number, p in zip(numbers, parameters, strict=False) if number in saved["state"]}


def shard(
    net: nn.Module,
    mesh: DeviceMesh,
    reduce_dtype: torch.dtype | None = None,
    expert_mesh: DeviceMesh | None = None,
) -> None:
    """Shard the blocks of a network, if it has any, each as a unit, then the rest of it; once.

    Experts are divided over a mesh of their own, if there is one, see `expert_parallel.divide`.
    """
    if not isinstance(net, FSDPModule):
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # none is changed in place
        policy = MixedPrecisionPolicy(reduce_dtype=reduce_dtype)
        experts = set() if expert_mesh is None else expert_parallel.divide(net, expert_mesh, policy)
        for part in (*getattr(net, "blocks", ()), net):
            fully_shard(
                part,
                mesh=mesh,
                reshard_after_forward=True,
                shard_placement_fn=lambda p: placement(p, mesh),
                mp_policy=policy,
                ignored_params=experts,
            )
            part.register_forward_hook(lambda *_: torch.clear_autocast_cache())  # bf16 copies end with their block


def placement(tensor: Tensor, mesh: DeviceMesh) -> Shard:
    """A tensor is divided along its first dimension that the processes divide evenly, such as a few experts' second."""
    even = (dim for dim, size in enumerate(tensor.shape) if size % mesh.size() == 0)
    return Shard(next(even, 0))


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """Of tensors over several meshes: the root of the sum of the squares of those of each."""
    norms = [whole(nn.utils.get_total_norm(own)) for own in _by_mesh(tensors)]
    return norms[0] if len(norms) == 1 else nn.utils.get_total_norm(norms)


def clip(parameters: Sequence[nn.Parameter], limit: float, norm: Tensor) -> None:
    """Clip gradients of which the norm is known, over several meshes.

    Torch multiplies by one where the norm is below the limit; here that is left out if no device has to be waited for.
    """
    if norm.device.type == "cpu" and limit / (norm + 1e-6) >= 1:
        return
    for own in _by_mesh(parameters):
        nn.utils.clip_grads_with_norm_(own, limit, norm)


def _by_mesh(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Torch takes no tensors of several meshes together."""
    found: dict[DeviceMesh | None, list[Tensor]] = {}
    for tensor in tensors:
        found.setdefault(getattr(tensor, "device_mesh", None), []).append(tensor)
    return list(found.values())


def gathered(state: Any, here: bool) -> Any:
    """A tree with sharded tensors whole and on the host in this process; elsewhere `None` is in their places.

    All processes gather together.
    """

    def full(value: DTensor) -> Tensor | None:
        values = value.full_tensor().detach()
        return values.cpu() if here else None

    return tree_map_only(DTensor, full, state)


def sharded_like(value: Any, own: Tensor | None) -> Any:
    """This process's part of a whole tensor that belongs to a sharded one, such as a moment of a weight."""
    if not isinstance(own, DTensor) or isinstance(value, DTensor) or value.shape != own.shape:
        return value
    return distribute_tensor(value, own.device_mesh, own.placements, src_data_rank=None).clone()  # not a view of it
