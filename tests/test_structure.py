"""The structure of the package: which part may import which, and how long its parts are."""

from __future__ import annotations

import ast
import functools
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import genfound
from tests.evaluation.runs import untrained_run

ROOT = Path(genfound.__file__).parent
COMMANDS = {"train", "sample", "evaluate", "encode", "convert", "report", "plan", "doctor", "fetch", "audit"}
ORDER = (
    {"batch", "rng", "config", "layers", "tokenizers"},
    {"layouts", "backbones", "objectives", "runtime"},
    {"samplers", "data", "loggers"},
    {"build", "modules", "metrics", "alignment", "text"},
    {"checkpoints", "encoding"},
    {"sampling"},
    {"evaluation"},
    {"callbacks"},
    {"training", "reporting"},
    COMMANDS,
)
"""A part imports those to its left and, beside it, those of its own group."""

LEVEL = {part: level for level, parts in enumerate(ORDER) for part in parts}
LONG_FUNCTIONS = {
    "backbones/fit.py:__init__", "backbones/nit.py:__init__",
}  # fmt: skip
"""Functions of more than 40 lines; none may be added."""
LONG_FILES: set[str] = set()
"""Files of more than 400 lines; none may be added."""
FILES = {
    ".".join(file.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): file
    for file in sorted(ROOT.rglob("*.py"))
}
del FILES["genfound"]


@functools.cache
def tree(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text())


def imported(module: str) -> set[str]:
    """The modules of genfound that a module imports, at any depth."""
    found = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("genfound.")}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "genfound":
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else str(node.module) for name in inside}
    return found - {"genfound", module}


RIGHTWARDS = {("genfound.data.datamodule", "genfound.build")}
"""`GenerativeDataModule.from_config`, for scripts, builds what its configuration says."""


def part(module: str) -> str:
    return module.split(".")[1]


def test_the_loose_files_are_the_commands_and_what_everything_needs() -> None:
    loose = {file.stem for file in ROOT.glob("*.py")}
    assert loose <= COMMANDS | {"__init__", "batch", "rng", "build", "training"}
    assert {part(module) for module in FILES} <= LEVEL.keys()


def test_imports_go_to_the_left() -> None:
    pairs = {(module, other) for module in FILES for other in imported(module)} - RIGHTWARDS
    assert not sorted(f"{m} imports {other}" for m, other in pairs if LEVEL[part(other)] > LEVEL[part(m)])


def test_nothing_imports_in_a_circle() -> None:
    graphlib.TopologicalSorter({m: {n for n in imported(m) if (m, n) not in RIGHTWARDS} for m in FILES}).prepare()


def test_files_and_functions_are_short() -> None:
    names = {module: file.relative_to(ROOT).as_posix() for module, file in FILES.items()}
    assert {names[m] for m, file in FILES.items() if len(file.read_text().splitlines()) > 400} <= LONG_FILES
    functions = [(m, f) for m in FILES for f in ast.walk(tree(m)) if isinstance(f, ast.FunctionDef)]
    long = {f"{names[m]}:{f.name}" for m, f in functions if (f.end_lineno or 0) - f.lineno >= 40}
    assert long <= LONG_FUNCTIONS


@pytest.mark.slow
def test_weights_are_loaded_where_lightning_cannot_be_imported(tmp_path: Path) -> None:
    """Also from a run, and sampled."""
    untrained_run(tmp_path / "run")
    code = """
import sys
sys.modules["lightning"] = None
import pytest

import genfound
loaded = genfound.load("run")
print(genfound.sample(loaded, labels=[1], size=(16, 16)).shape)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.endswith("(1, 16, 16, 3)\n"), done.stderr


def test_a_command_answers_before_heavy_libraries_are_imported() -> None:
    """What `--help`, a wrong key and the start of a sweep's jobs wait for."""
    commands = sorted(COMMANDS & {file.stem for file in ROOT.glob("*.py")})
    code = f"""
import importlib, sys
for name in {commands}:
    importlib.import_module("genfound." + name)
print(sorted({{"torch", "numpy", "lightning", "wandb", "diffusers"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "[]\n", done.stdout + done.stderr
