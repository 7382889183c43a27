"""How long commands take to start, by the clock, each in a fresh process.

python -m benchmarks.startup [--repeats 5]

A run of one step of the default has imports, data, the step, its checkpoint and its end; beside it stands the import of
what it is built on.
"""

import argparse
import subprocess
import sys
import tempfile
import time

from benchmarks.report import facts, write
from benchmarks.timing import medians

COMMANDS = {
    "import torch": ["-c", "import torch"],
    "import torch, lightning, hydra": ["-c", "import torch, lightning, hydra"],
    "genfound.train --help": ["-m", "genfound.train", "--help"],
    "genfound.train --cfg job": ["-m", "genfound.train", "--cfg", "job"],
    "genfound.plan": ["-m", "genfound.plan", "model=nit_xl", "data=imagenet_native", "trainer.devices=8"],
    "genfound.train, one step": [
        "-m", "genfound.train", "trainer.max_steps=1", "logger=jsonl", "callbacks.validation=null",
        "callbacks.preview=null",
    ],
}  # fmt: skip
"""What a row is called, and the arguments of Python."""


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    took = medians([[start(command) for command in COMMANDS.values()] for _ in range(arguments.repeats + 1)][1:])
    lines = ["| command | s |", "|---|---|"]
    lines += [f"| {name} | {each:.2f} |" for name, each in zip(COMMANDS, took, strict=True)]
    print("\n".join(lines), write("startup", [facts(), "\n".join(lines)]), sep="\n")


def start(command: list[str]) -> float:
    """Seconds to its end, in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        subprocess.run([sys.executable, *command], check=True, capture_output=True, cwd=folder)
        return time.perf_counter() - begin


if __name__ == "__main__":
    main()
