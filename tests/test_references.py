"""What tests and benchmarks name of the package is there, also in lines that a short run does not reach."""

from __future__ import annotations

import ast
import contextlib
import importlib
from pathlib import Path

import genfound

ROOT = Path(genfound.__file__).parents[2]


def lookup(module: str, name: str) -> object:
    """The attribute, or the module of that name; None if there is neither."""
    with contextlib.suppress(ModuleNotFoundError):
        importlib.import_module(f"{module}.{name}")
    return getattr(importlib.import_module(module), name, None)


def missing(code: str) -> list[str]:
    """Imports of the package, and attributes of its imported modules, that are not there."""
    nodes, modules, named = list(ast.walk(ast.parse(code))), {}, []
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "genfound":
            named += [(str(node.module), alias.name) for alias in node.names]
            modules |= {alias.asname or alias.name: (str(node.module), alias.name) for alias in node.names}
    modules = {alias: ".".join(place) for alias, place in modules.items() if hasattr(lookup(*place), "__spec__")}
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            named.append((modules[node.value.id], node.attr))
    return sorted({f"{module}.{name}" for module, name in named if lookup(module, name) is None})


def test_what_is_named_is_there() -> None:
    files = [*(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    lost = {str(file.relative_to(ROOT)): missing(file.read_text()) for file in files}
    assert len(lost) > 200
    assert not {file: names for file, names in lost.items() if names}


def test_what_is_not_there_is_found() -> None:
    code = "from genfound.alignment import vit\nfrom genfound import batch, gone\nvit.RANDOM\nvit.away\nbatch.lost()\n"
    assert missing(code) == ["genfound.alignment.vit.away", "genfound.batch.lost", "genfound.gone"]
