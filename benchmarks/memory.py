"""Peak memory on the CPU: of training steps, beside the sum of what they must hold, and of loading.

python -m benchmarks.memory [--model nit_b] [--tokens 1024]

Each figure is how much the resident memory of a process of its own grows at most, Linux only. A step must hold
weights, gradients, two moments and one average. What is loaded is a file of the same network, mapped into memory; its
pages count as long as they are not needed for something else.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

import genfound
from benchmarks.report import facts, write
from benchmarks.throughput import training
from genfound.backbones.base import Backbone
from genfound.checkpoints import formats
from genfound.config import compose
from genfound.runtime.processes import tune_malloc

PARTS = 5
"""Weights, gradients, two moments, average."""


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nit_b")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--inside", choices=INSIDE, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.inside:
        print(json.dumps(INSIDE[arguments.inside](arguments)))
        return
    lines = [f"## {arguments.model}, {arguments.tokens:,} tokens, float32", "", "| | peak, MB | parts, MB | ratio |"]
    lines.append("|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name in INSIDE:
            command = [sys.executable, "-m", "benchmarks.memory", "--inside", name, "--model", arguments.model]
            command += ["--tokens", str(arguments.tokens), "--file", f"{folder}/weights.safetensors"]
            printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            parts, most = json.loads(printed.splitlines()[-1])
            lines.append(f"| {name} | {most:,.0f} | {parts:,.0f} | {most / parts:.2f} |")
            print(lines[-1], flush=True)
    print(write("memory", [facts(), "\n".join(lines)]))


def step(arguments: argparse.Namespace) -> tuple[float, float]:
    """Megabytes of the parts of two training steps, and their peak; writes the file that `load` reads."""
    tune_malloc()
    before = forget()
    made = training(torch.device("cpu"), arguments.model, arguments.tokens, "fp32")
    for _ in range(2):
        made.step()
    net = made.net
    found = PARTS * size(net), peak() - before
    note = {"format": formats.FORMAT, "config": compose.compose("train", [f"model={arguments.model}"])}
    formats.write(arguments.file, net.state_dict(), {**note, "class_names": ["x"] * 1000, "sizes": [(256, 256)]})
    return found


def load(arguments: argparse.Namespace) -> tuple[float, float]:
    """Megabytes of a network and of its file, and the peak of loading it."""
    tune_malloc()
    compose.compose("train", [f"model={arguments.model}"])
    before = forget()
    net = genfound.load(arguments.file).net
    return 2 * size(net), peak() - before


INSIDE: dict[str, Callable[[argparse.Namespace], tuple[float, float]]] = {"step": step, "load": load}


def size(net: Backbone) -> float:
    """Megabytes of the weights."""
    return sum(p.nbytes for p in net.parameters()) / 2**20


def forget() -> float:
    """Megabytes that are resident now; the peak is counted from here."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> float:
    """The most megabytes that this process has had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


if __name__ == "__main__":
    main()
