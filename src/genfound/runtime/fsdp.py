"""Fully sharded data parallelism: every process keeps its part of each tensor, and gathers a block as it is computed.

This is torch's FSDP2 (`torch.distributed.fsdp.fully_shard`) under Lightning's `ModelParallelStrategy`. Checkpoints are
files of one process, in which tensors are whole, or folders to which each process adds its parts; a run may change its
strategy with both.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, empty
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from genfound.runtime import checkpoint_io


class FullyShardedStrategy(ModelParallelStrategy):
    """One mesh of all processes.

    Args:
        save_distributed_checkpoint: checkpoints are folders in which each process writes its part; otherwise the first
            one gathers all tensors and writes a file.
        reduce_dtype: `bf16`: gradients are summed over processes in bfloat16; `None`: in float32, as they are.
    """

    lightning_restore_optimizer = True

    def __init__(self, save_distributed_checkpoint: bool = False, reduce_dtype: str | None = None) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=save_distributed_checkpoint)
        self.reduce_dtype = {None: None, "bf16": torch.bfloat16}[reduce_dtype]

    def setup_environment(self) -> None:
        """Lightning's `auto` is the number of machines."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

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

        mesh = self.device_mesh["data_parallel"]

        def part(name: str, whole: Tensor) -> Tensor:
            return empty(whole.shape, dtype=whole.dtype, device_mesh=mesh, placements=[placement(whole, mesh)])

        return Values(path).filled(checkpoint_io.read(path, parts=()), part)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Take this process's part of each weight."""
        assert self.lightning_module is not None
        own, saved = self.lightning_module.state_dict(), checkpoint["state_dict"]
        state = {name: sharded_like(value, own.get(name)) for name, value in saved.items()}
        self.lightning_module.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take this process's part of each moment."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            numbers = [number for group in saved["param_groups"] for number in group["params"]]
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            owners = {number: p for number, p in zip(numbers, parameters, strict=True) if number in saved["state"]}
            parts = {
                number: {key: sharded_like(value, p) for key, value in saved["state"][number].items()}
                for number, p in owners.items()
            }
            optimizer.load_state_dict({**saved, "state": parts})


def shard(net: nn.Module, mesh: DeviceMesh, reduce_dtype: torch.dtype | None = None) -> None:
    """Shard the blocks of a network, if it has any, each as a unit, then the rest of it; once."""
    if not isinstance(net, FSDPModule):
        policy = MixedPrecisionPolicy(reduce_dtype=reduce_dtype)
        for part in (*getattr(net, "blocks", ()), net):
            fully_shard(
                part,
                mesh=mesh,
                reshard_after_forward=True,
                shard_placement_fn=lambda p: placement(p, mesh),
                mp_policy=policy,
            )
            part.register_forward_hook(lambda *_: torch.clear_autocast_cache())  # bf16 copies end with their block


def placement(tensor: Tensor, mesh: DeviceMesh) -> Shard:
    """A tensor is divided along its first dimension that the processes divide evenly, such as a few experts' second."""
    even = (dim for dim, size in enumerate(tensor.shape) if size % mesh.size() == 0)
    return Shard(next(even, 0))


def gathered(state: Any, here: bool) -> Any:
    """A tree with sharded tensors whole and on the host in this process; elsewhere `None` is in their places.

    All processes gather together.
    """

    def whole(value: DTensor) -> Tensor | None:
        full = value.full_tensor().detach()
        return full.cpu() if here else None

    return tree_map_only(DTensor, whole, state)


def sharded_like(value: Any, own: Tensor | None) -> Any:
    """This process's part of a whole tensor that belongs to a sharded one, such as a moment of a weight."""
    if not isinstance(own, DTensor) or isinstance(value, DTensor) or value.shape != own.shape:
        return value
    return distribute_tensor(value, own.device_mesh, own.placements, src_data_rank=None).clone()  # not a view of it
