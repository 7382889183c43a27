"""A Slurm of two nodes on this machine, each with two graphics cards that are none; Debian has its programs.

apt-get install slurmctld slurmd slurm-client munge
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

PATH = os.pathsep.join([os.environ["PATH"], "/usr/sbin"])
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel")
MISSING = [program for program in PROGRAMS if not shutil.which(program, path=PATH)]
NODES = (socket.gethostname(), "localhost")

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
SlurmdSpoolDir={folder}/%n
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MailProg=/bin/true
GresTypes=gpu
NodeName={host} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 Gres=gpu:2
NodeName=localhost NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 Gres=gpu:2
PartitionName=two Nodes=ALL MaxTime=INFINITE State=UP
"""


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in found:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in found]


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[Path]:
    """Its configuration (SLURM_CONF), as long as it runs."""
    config, key = folder / "slurm.conf", folder / "munge.key"
    (folder / "state").mkdir()
    key.touch(0o600)
    key.write_bytes(os.urandom(128))
    config.write_text(CONFIG.format(host=NODES[0], user=getpass.getuser(), folder=folder, ports=free_ports(3)))
    (folder / "gres.conf").write_text("Name=gpu File=/dev/null,/dev/zero\n")
    munge = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
    env = os.environ | {"PATH": PATH, "SLURM_CONF": str(config)}
    commands = [
        ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *munge],
        ["slurmctld", "-D"],
        *(["slurmd", "-D", "-N", node] for node in NODES),
    ]
    with contextlib.ExitStack() as stack:
        for command in commands:
            stack.callback(
                _end, subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            )
            time.sleep(0.5)
        deadline = time.monotonic() + 60
        while (
            subprocess.run(
                ["sinfo", "-h", "-t", "idle", "-o", "%D"], env=env, capture_output=True, check=False
            ).stdout.strip()
            != b"2"
        ):
            assert time.monotonic() < deadline, (folder / "slurmctld.log").read_text()
            time.sleep(0.2)
        yield config
        subprocess.run(["scancel", "--full", "--signal=KILL", f"--user={getpass.getuser()}"], env=env, check=False)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    process.wait(30)
