"""An all-reduce over the processes of a training: whether they reach each other, and how fast."""

import json
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from genfound.config.errors import JobError
from genfound.config.options import world_size
from genfound.runtime import devices, launch, processes, rendezvous

PATIENCE = 20
"""Seconds for the processes to reach each other; then SIGALRM ends them, wherever they wait."""

WAY_OUT = "NCCL_DEBUG=INFO says why; NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME name the network interface"

REPEATS = 5


def all_reduce(config: Mapping[str, Any]) -> str:
    """What the processes that `trainer.devices` and `trainer.num_nodes` name have found, in words.

    Raises:
        ValueError: they cannot be started, have not reached each other, or their sum is wrong.
    """
    trainer = config["trainer"]
    if world_size(config) == 1:
        return "one process has nothing to reduce; trainer.devices=N tries N"
    device = devices.device(trainer["accelerator"], key="trainer.accelerator")
    devices.check_count("trainer.devices", trainer["devices"], device)
    with (
        tempfile.TemporaryDirectory(prefix="genfound-") as folder,
        rendezvous.machines(trainer["num_nodes"], config["rdzv"]) as others,
    ):
        if others:
            others.agree("genfound.doctor")
        request = {"accelerator": trainer["accelerator"], "out": f"{folder}/found"}
        try:
            launch.launch(__name__, request, trainer["devices"], others, Path(folder) / "log")
        except JobError as error:
            late, reason = f"they have not reached each other in {PATIENCE} s", str(error).partition("; ")[0]
            raise ValueError(f"{late if 'SIGALRM' in reason else reason}; {WAY_OUT}") from None
        return Path(request["out"]).read_text()


def _measure(accelerator: str, place: processes.RankInfo) -> str:
    """The bandwidth of a ring's links: 2 (n - 1) / n bytes of the tensor, by its time."""
    device, ranks = devices.device(accelerator, place.local_rank), place.world_size
    distributed.init_process_group(devices.backend(device))
    tensor = torch.full((2**26 if device.type == "cuda" else 2**22,), 1.0 + place.rank, device=device)
    distributed.all_reduce(tensor)
    if not bool((tensor == ranks * (ranks + 1) / 2).all()):
        raise ValueError(f"process {place.rank} got a wrong sum; NCCL_P2P_DISABLE=1 shows whether links are broken")
    begin = time.perf_counter()
    for _ in range(REPEATS):
        distributed.all_reduce(tensor)
    places = [""] * ranks
    float(tensor[0])  # waits for the device
    speed = 2 * (ranks - 1) / ranks * tensor.nbytes * REPEATS / (time.perf_counter() - begin) / 1e9
    distributed.all_gather_object(places, f"{socket.gethostname()} {device}")
    return f"{ranks} processes, {speed:.1f} GB/s: {', '.join(places)}"


if __name__ == "__main__":
    with launch.reporting():
        _request = json.loads(Path(sys.argv[1]).read_text())
        _place = processes.rank_info()
        if hasattr(signal, "alarm"):  # not on Windows
            signal.alarm(PATIENCE)
        _found = _measure(_request["accelerator"], _place)
        if _place.local_rank == 0:
            Path(_request["out"]).write_text(_found)
