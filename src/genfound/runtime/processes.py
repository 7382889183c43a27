"""Which process of a group this is."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import NamedTuple

from genfound.config.environment import LAUNCH


class RankInfo(NamedTuple):
    """Of a process in its group; `local_rank` counts on its machine."""

    rank: int
    world_size: int
    local_rank: int


SINGLE_PROCESS = RankInfo(0, 1, 0)


def rank_info() -> RankInfo:
    """The place that genfound gave this process when it started it.

    Raises:
        ValueError: it was started by something else.
    """
    given = [os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
    if Path(os.environ.get(LAUNCH, os.devnull)).is_dir():
        if given == [None] * 3:
            return SINGLE_PROCESS
        if all(value is not None and value.isdecimal() for value in given):
            found = RankInfo(*(int(value) for value in given if value))
            if found.local_rank <= found.rank < found.world_size:
                return found
    raise ValueError(
        "this module is a process of a group that genfound starts itself: give the command, such as "
        "python -m genfound.train ... trainer.devices=N"
    )


def tune_malloc() -> None:
    """Let glibc keep the memory of a step for the next one, instead of paging it in anew (1.5x on CPUs)."""
    if sys.platform == "linux":
        trim_threshold, top_pad, mmap_threshold = -1, -2, -3
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(mmap_threshold, 2**25)
            libc.mallopt(trim_threshold, 2**31 - 1)
            libc.mallopt(top_pad, 2**26)
