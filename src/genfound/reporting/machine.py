"""What a machine has for a training, one finding after another."""

import contextlib
import netrc
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from rich.console import Console
from rich.table import Table

from genfound import build
from genfound.config import compose
from genfound.config.errors import sentence
from genfound.layers.attention import available_backends, lacking
from genfound.layers.expert_kernels import choose_kernel
from genfound.reporting import kernels
from genfound.reporting.all_reduce import all_reduce
from genfound.runtime import devices
from genfound.runtime.files import check_folder

GB = 1e9
STYLES = {"ok": "", "warning": "yellow", "problem": "bold red"}


class Finding(NamedTuple):
    """A line of the table; `status` is `ok`, `warning`, or `problem`, by which a training would fail."""

    what: str
    found: str
    status: str = "ok"
    way_out: str = ""


class Machine(NamedTuple):
    """The configuration of a training, and what it would run on."""

    config: Mapping[str, Any]
    device: torch.device
    precision: str  # Lightning's name
    dtype: torch.dtype  # of products


def examine(config: Mapping[str, Any]) -> Iterator[Finding]:
    """The findings for a configuration of `genfound.train`, each when it is known."""
    device = torch.device("cpu")
    with contextlib.suppress(ValueError):  # which the finding about the hardware says
        device = devices.device(config["trainer"]["accelerator"])
    precision = devices.precision(config["trainer"]["precision"], device)
    machine = Machine(config, device, precision, torch.bfloat16 if precision == "bf16-mixed" else torch.float32)
    for what, check in CHECKS.items():
        try:
            yield from check(machine)
        except Exception as error:  # whatever it is, the other findings are wanted too
            kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
            found, _, way_out = (kind + sentence(error))[:500].partition("; ")
            yield Finding(what, found, "problem", way_out)


def show(findings: Iterable[Finding]) -> list[Finding]:
    """Print the findings as a table."""
    terminal = Console().is_terminal
    console = Console(markup=False, highlight=False, width=None if terminal else 200)
    shown, table = [], Table("what", "found", "status", "way out", box=None, padding=(0, 2, 0, 0))
    with console.status("examining this machine"):
        for finding in findings:
            shown.append(finding)
            table.add_row(finding.what, finding.found, finding.status, finding.way_out, style=STYLES[finding.status])
    console.print(table)
    return shown


def _versions(machine: Machine) -> Iterator[Finding]:
    """Of the dependencies, beside those that are needed and those that the tests run with."""
    constraints = Path(compose.config_dir()).parent / "constraints.txt"
    pins = [Requirement(line) for line in constraints.read_text().splitlines() if not line.startswith("#")]
    tested = {canonicalize_name(pin.name): pin.specifier for pin in pins}
    wrong, others, names = [], [], set()
    for required in map(Requirement, metadata.requires("genfound") or ()):
        pin = tested.get(canonicalize_name(required.name), required.specifier)
        try:
            found = Version(metadata.version(required.name)).public
        except metadata.PackageNotFoundError:
            wrong.extend([] if required.marker else [f"{required.name} is missing"])  # an extra may be
            continue
        names.add(required.name)
        if not required.specifier.contains(found, prereleases=True):
            wrong.append(f"{required.name} {found} is not {required.specifier}")
        elif not pin.contains(found):
            others.append(f"{required.name} {found} is not the tested {str(pin).lstrip('=')}")
    told = ", ".join([*wrong, *others]) or f"{len(names)} packages as tested"
    bad = ("problem" if wrong else "warning", f"pip install -c {constraints} genfound") if wrong or others else ()
    yield Finding("versions", f"Python {platform.python_version()}, torch {torch.__version__}; {told}", *bad)


def _hardware(machine: Machine) -> Iterator[Finding]:
    """Processor and GPUs."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("processor", f"{cores} cores, {torch.backends.cpu.get_cpu_capability()}, {platform.platform()}")
    devices.device(machine.config["trainer"]["accelerator"], key="trainer.accelerator")
    for number in range(torch.cuda.device_count() if machine.device.type == "cuda" else 0):
        free, total = (size / GB for size in torch.cuda.mem_get_info(number))
        capability = ".".join(map(str, torch.cuda.get_device_capability(number)))
        name = f"{torch.cuda.get_device_name(number)}, capability {capability}, {free:.0f} of {total:.0f} GB free"
        taken = ("warning", "nvidia-smi shows which process has the rest") if free < 0.9 * total else ()
        yield Finding(f"cuda:{number}", name, *taken)
    if machine.device.type == "mps":
        yield Finding("mps", f"Apple's GPU, with up to {torch.mps.recommended_max_memory() / GB:.0f} GB of the memory")
    if shutil.which("nvidia-smi") and not torch.cuda.is_available():
        lack = "torch is built without CUDA" if torch.version.cuda is None else f"not for torch's {torch.version.cuda}"
        yield Finding("CUDA", f"there is a driver, but {lack}", "warning", "install the torch for it: pytorch.org")


def _bf16(machine: Machine) -> Iterator[Finding]:
    """Whether products in bf16 are right, and faster than in float32."""
    error, limit = kernels.bf16_error(machine.device), kernels.TOLERANCE[torch.bfloat16]
    half, single = (kernels.products_per_second(dtype, machine.device) for dtype in (torch.bfloat16, torch.float32))
    slow = machine.dtype == torch.bfloat16 and half < single
    bad = ("problem" if error > limit else "warning", "trainer.precision=fp32") if error > limit or slow else ()
    kept = "bf16" if machine.dtype == torch.bfloat16 else "fp32"
    found = f"{half / single:.2g} times as fast as float32, right to {error:.0e}; trainer.precision is {kept} here"
    yield Finding("bf16", found, *bad)


def _attention(machine: Machine) -> Iterator[Finding]:
    """Each backend, its output and gradients."""
    kind, dtype = machine.device.type, machine.dtype
    for name, lack in lacking(kind, dtype).items():
        used = "; model.attention=auto takes it" if name == available_backends(kind, dtype)[0] else ""
        if lack:
            yield Finding(f"attention {name}", f"needs {lack}")
        else:
            error = kernels.attention_error(name, machine.device, dtype)
            yield _judged(f"attention {name}", error, dtype, used, "model.attention=loop")


def _experts(machine: Machine) -> Iterator[Finding]:
    """The two forms of the experts of DiT-MoE."""
    used = f"; training takes {choose_kernel(machine.device.type, machine.dtype, 64, 128)}"
    error = kernels.experts_error(machine.device, machine.dtype)
    yield _judged("grouped matmul", error, machine.dtype, used, "another version of torch")


def _recurrences(machine: Machine) -> Iterator[Finding]:
    """The recurrences of DiG and DiM in the form that training takes."""
    for name, form, error in kernels.recurrence_errors(machine.device):
        used, way_out = f"; model.recurrence=auto takes {form}", "model.recurrence=reference"
        yield _judged(f"recurrence of {name}", error, torch.float32, used, way_out)


def _compile(machine: Machine) -> Iterator[Finding]:
    """A compiled block, unless that is switched off."""
    wanted = machine.config["compile"]
    used = devices.compiled(wanted, machine.device)
    if wanted is False:
        yield Finding("torch.compile", "switched off by compile=false")
        return
    try:
        seconds, error = kernels.compiled_block(machine.device, machine.dtype)
    except Exception as failure:
        reason = f"{type(failure).__name__}: {sentence(failure)[:300]}"
        yield Finding("torch.compile", reason, "problem" if used else "warning", "install gcc, or compile=false")
        return
    note = f"; {seconds:.0f} s for a block" + ("" if used else "; compile=true uses it on a CPU")
    yield _judged("torch.compile", error, machine.dtype, note, "compile=false")


def _judged(what: str, error: float, dtype: torch.dtype, note: str, way_out: str) -> Finding:
    wrong = () if error <= kernels.TOLERANCE[dtype] else ("problem", way_out)
    return Finding(what, f"relative error of output and gradients {error:.0e}{note}", *wrong)


def _disk(machine: Machine) -> Iterator[Finding]:
    """The folder of the runs: how large and fast its disk is."""
    runs, content = Path(machine.config["runs"]).absolute(), os.urandom(2**25)
    check_folder("runs", runs)
    there = next(folder for folder in (runs, *runs.parents) if folder.is_dir())
    with tempfile.TemporaryDirectory(prefix=".genfound-", dir=there) as scratch:
        begin = time.perf_counter()
        with open(Path(scratch) / "probe", "wb", buffering=0) as file:
            file.write(content)
            os.fsync(file.fileno())
        speed = len(content) / 1e6 / (time.perf_counter() - begin)
    usage = shutil.disk_usage(there)
    bad = ("warning", "runs=... on another disk") if usage.free < 10 * GB or speed < 20 else ()
    space = f"{usage.free / GB:,.0f} of {usage.total / GB:,.0f} GB free"
    yield Finding("runs", f"{there}: {space}, {speed:,.0f} MB/s", *bad)


def _surroundings(machine: Machine) -> Iterator[Finding]:
    """/dev/shm, which NCCL and data workers use; W&B, whose server is not asked; the job of Slurm."""
    if (shared := Path("/dev/shm")).is_dir():
        free = shutil.disk_usage(shared).free / GB
        small = ("warning", "docker run --ipc=host, or --shm-size=16g") if free < 1 else ()
        yield Finding("/dev/shm", f"{free:,.1f} GB free", *small)
    mode, key = os.environ.get("WANDB_MODE") or "online", "WANDB_API_KEY" in os.environ
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        key = key or any("wandb" in host for host in netrc.netrc().hosts)
    used = f"WANDB_MODE={mode}" if mode != "online" else "logged in" if key else "offline: nobody is logged in"
    loggers = machine.config["logger"]
    yield Finding("W&B", used if "wandb" in loggers else f"not used by logger={','.join(loggers) or 'jsonl'}")
    job, nodes = (os.environ.get(f"SLURM_{name}") for name in ("JOB_ID", "NNODES"))
    other = job is not None and nodes not in (None, str(machine.config["trainer"]["num_nodes"]))
    way_out = ("warning", f"trainer.num_nodes={nodes}, with one task on each") if other else ()
    yield Finding("Slurm", "not in a job" if job is None else f"job {job} of {nodes} nodes", *way_out)


def _tokenizer(machine: Machine) -> Iterator[Finding]:
    """Whether its weights are at hand."""
    folder = build.fetch_tokenizer(machine.config, download=False)
    yield Finding("tokenizer", f"{build.name_of(machine.config['tokenizer'])}: {folder or 'needs no weights'}")


def _processes(machine: Machine) -> Iterator[Finding]:
    """An all-reduce over those of the training."""
    yield Finding("all-reduce", all_reduce(machine.config))


CHECKS: dict[str, Callable[[Machine], Iterator[Finding]]] = {
    "versions": _versions, "hardware": _hardware, "bf16": _bf16, "attention": _attention, "grouped matmul": _experts,
    "recurrence": _recurrences, "torch.compile": _compile, "runs": _disk, "/dev/shm": _surroundings,
    "tokenizer": _tokenizer, "all-reduce": _processes,
}  # fmt: skip
