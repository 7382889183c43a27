"""Writing a checkpoint as a folder, in which each process writes its part of sharded tensors; see `sharded_values`.

All processes plan it together. Then each writes alone, in a thread, and the first one gives the folder its name when it
finds all parts, so that no thread takes part in a collective operation.
"""

import pickle
import secrets
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor

from genfound.runtime import checkpoint_io, sharded_values
from genfound.runtime.files import atomic_write, remove_tree

WRITTEN = "written-{}.pickle"
"""What a process tells the first one of its part, in the folder until it takes its name."""

SECONDS = 0.05
"""Between two looks for the parts of the others."""


class ShardedSave:
    """A checkpoint that is being written; begun by all processes together.

    Args:
        state: a tree with sharded tensors, alike in all processes; the first one writes the rest of it.
        folder: takes its name when all of it is on the disk.
        copy: to the host first, so that `state` may change before it is written.
    """

    def __init__(self, state: dict[str, Any], folder: Path, copy: bool) -> None:
        self._folder, self._first = folder, dist.get_rank() == 0
        self._partial = folder.with_name(f"{checkpoint_io.PARTIAL}{folder.name}")
        if self._first:
            checkpoint_io.remove_left(folder.parent)
            self._partial.mkdir(parents=True)  # before the others hear of the save
        rest, tensors = sharded_values.without_values(state)
        self._rest = checkpoint_io.copied(rest) if copy and self._first else rest
        self._part = _Part(tensors, self._partial, copy)
        self._given_up = threading.Event()
        thread = ThreadPoolExecutor(1, "checkpoint")
        self._written = thread.submit(self._part.write)
        self._named = thread.submit(self._name) if self._first else None
        thread.shutdown(wait=False)

    def complete(self) -> None:
        """Wait until it has its name; all processes together.

        Raises:
            OSError: one of them could not write its part, such as on a full disk; in all.
        """
        try:
            self._agree(self._written)
            self._agree(self._named)
        except OSError as error:
            error.filename = str(self._folder)
            raise
        finally:  # also where another process has died: a thread that looks for its part would never end
            self.give_up()

    def give_up(self) -> None:
        """Wait for no other process, and remove what has no name by now; of this process alone."""
        self._given_up.set()
        for future in (self._written, self._named):
            if future is not None:
                future.exception()
        if self._first:
            remove_tree(self._partial)

    def _agree(self, future: Future[None] | None) -> None:
        own = future.exception() if future is not None else None
        errors: list[BaseException | None] = [None] * dist.get_world_size()
        dist.all_gather_object(errors, own if isinstance(own, OSError | None) else RuntimeError(repr(own)))
        for error in (own, *errors):
            if error is not None:
                raise error

    def _name(self) -> None:
        self._written.result()
        number = self._part.number
        checkpoint_io.save({**self._rest, sharded_values.SAVE: number}, self._partial / checkpoint_io.STATE)
        missing = [self._partial / WRITTEN.format(rank) for rank in range(dist.get_world_size())]
        while any(not file.exists() for file in missing):
            if self._given_up.wait(SECONDS):
                return
        self._part.finish([sharded_values.unpickled(file) for file in missing])
        for file in missing:
            file.unlink()
        if self._folder.exists():
            checkpoint_io.remove(self._folder)
        self._partial.rename(self._folder)


class _Part(DefaultSavePlanner):
    """What this process writes of sharded tensors; planned by all together.

    Attributes:
        number: of the save.
    """

    def __init__(self, tensors: Mapping[str, Tensor], folder: Path, copy: bool) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        rank, drawn = dist.get_rank(), [secrets.randbits(62)]
        dist.broadcast_object_list(drawn)
        self.number, self._file = drawn[0], folder / WRITTEN.format(rank)
        values = {**tensors, f"{sharded_values.SAVE}.{rank}": torch.tensor(self.number)}
        self._storage = FileSystemWriter(folder)
        self._storage.set_up_storage_writer(rank == 0)
        self.set_up_planner(values, is_coordinator=rank == 0)
        plans: list[SavePlan] = [SavePlan([])] * dist.get_world_size()
        dist.all_gather_object(plans, self._storage.prepare_local_plan(self.create_local_plan()))
        plans, self.metadata = self.create_global_plan(plans)
        self.finish_plan(self._storage.prepare_global_plan(plans)[rank])
        pieces = {name: value.to_local() if isinstance(value, DTensor) else value for name, value in values.items()}
        self.state_dict = checkpoint_io.copied(pieces) if copy else pieces

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """This process's one piece of a tensor."""
        return self.state_dict[index.fqn]  # type: ignore[no-any-return]

    def write(self) -> None:
        """Write it, then what the first process must know of it."""
        with checkpoint_io.full_disk():
            written = self._storage.write_data(self.plan, self).wait()
        atomic_write(self._file, lambda temporary: temporary.write_bytes(pickle.dumps(written)))

    def finish(self, written: list[list[WriteResult]]) -> None:
        """Write the metadata; in the first process."""
        self._storage.finish(self.metadata, written)
