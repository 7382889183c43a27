"""Python files that need no genfound, written out of its modules: what some definitions need, in one file.

A file holds the definitions that its roots reach, as they stand in their modules. Left out are methods that nothing
calls, initial values (weights are loaded), and imports of genfound.
"""

import ast
import importlib.util
import re
from collections.abc import Collection, Iterator
from pathlib import Path

Name = tuple[str, str]
"""Module, and name of a definition in it."""

STAND_INS = "genfound.checkpoints.diffusers.network"
REPLACED = {
    ("genfound.layers.adaln", "multiply_add"),
    ("genfound.layers.attention", "packed_attention"),
    ("genfound.layers.attention", "with_block_mask"),
    ("genfound.layers.moe", "Experts"),
}
"""Definitions whose places those of the same name in `STAND_INS` take: inference alone, in released shapes."""

INITIAL = "initialise"
"""The method that sets initial values."""

CALLED = {"forward", "save_pretrained"}
"""Methods that torch and diffusers call."""


class Module:
    """The definitions of a module's first level, and where its other names come from."""

    def __init__(self, name: str) -> None:
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.origin is not None
        text = Path(spec.origin).read_text(encoding="utf-8")
        self.name, self.lines = name, text.splitlines()
        self.definitions: dict[str, list[ast.stmt]] = {}
        self.annotations: set[str] = set()  # names that annotations in quotes may hold, and nothing defines
        self.imports: dict[str, Name] = {}  # name here -> module, and name there, "" for the module itself
        last: list[ast.stmt] = []
        for node in ast.parse(text).body:
            if isinstance(node, ast.If):  # imports for annotations alone
                self.annotations |= {alias.name for inner in node.body for alias in getattr(inner, "names", [])}
            elif isinstance(node, ast.Import):
                self.imports |= {alias.asname or alias.name: (alias.name, "") for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                self.imports |= {alias.asname or alias.name: (str(node.module), alias.name) for alias in node.names}
            elif names := _defined(node):
                last = [node]
                self.definitions |= dict.fromkeys(names, last)
            elif isinstance(node, ast.Expr) and last:
                last.append(node)  # what is said of a constant, below it


class Merged:
    """The definitions that roots reach."""

    def __init__(self, roots: Collection[Name]) -> None:
        self.modules: dict[str, Module] = {}  # each after those that it imports
        self.called = {*CALLED}  # names of attributes, which may be those of methods
        self.kept: set[Name] = set()
        self.foreign: dict[str, Name] = {}  # names from other packages
        before = -1
        while before != (before := len(self.called)):  # what is called in a method may keep another one
            self.kept.clear()
            for root in roots:
                self._keep(root)

    def text(self) -> str:
        """Imports, then the definitions."""
        owners = {name: module for module in self.modules for kept, name in self.kept if kept == module}
        renamed = {
            (module, name): f"{module.rpartition('.')[2].title().replace('_', '')}{name}"
            for module, name in self.kept
            if owners[name] != module  # the last one keeps it
        }
        parts = [part for module in self.modules.values() for part in self._parts(module, renamed)]
        return "\n\n\n".join([self._import_lines(), *parts]) + "\n"

    def _module(self, name: str) -> Module:
        if name not in self.modules:
            module = Module(name)
            for other, _ in module.imports.values():
                if other.startswith("genfound."):
                    self._module(other)
            self.modules[name] = module
        return self.modules[name]

    def _keep(self, name: Name) -> None:
        """Keep a definition and what it needs."""
        name = (STAND_INS, name[1]) if name in REPLACED else name
        if name in self.kept:
            return
        self.kept.add(name)
        module = self._module(name[0])
        for definition in module.definitions[name[1]]:
            for node in _walk(definition, self._left_out(definition)):
                if isinstance(node, ast.Attribute):
                    self.called.add(node.attr)
                elif isinstance(node, ast.Name) and node.id in module.definitions:
                    self._keep((module.name, node.id))
                elif isinstance(node, ast.Name) and (origin := module.imports.get(node.id)) is not None:
                    if origin[0].startswith("genfound."):
                        self._keep(origin)
                    else:
                        self.foreign[node.id] = origin

    def _left_out(self, definition: ast.stmt) -> list[ast.stmt]:
        """The statements that set initial values, and methods that nothing calls."""
        initial = [node for node in ast.walk(definition) if isinstance(node, ast.Expr) and _initialises(node.value)]
        methods = [node for node in getattr(definition, "body", []) if isinstance(node, ast.FunctionDef)]
        return [*initial, *(m for m in methods if isinstance(definition, ast.ClassDef) and not self._needed(m.name))]

    def _needed(self, method: str) -> bool:
        special = method.startswith("__") and method != "__getstate__"
        return special or (method in self.called and method != INITIAL)

    def _parts(self, module: Module, renamed: dict[Name, str]) -> list[str]:
        """The text of a module's kept definitions, in their order."""
        new = {name: other for (owner, name), other in renamed.items() if owner == module.name}
        new |= {here: renamed[origin] for here, origin in module.imports.items() if origin in renamed}
        kept = {id(nodes): nodes for name, nodes in module.definitions.items() if (module.name, name) in self.kept}
        parts = []
        for nodes in kept.values():
            gone = {n for node in self._left_out(nodes[0]) for n in _lines_of(node)}
            lines = [module.lines[n - 1] for node in nodes for n in _lines_of(node) if n not in gone]
            text = re.sub(r"\n\n\n+", "\n\n", "\n".join(lines)).rstrip()
            for old, other in new.items():
                text = re.sub(rf"(?<![\w.`]){old}(?!\w)", other, text)
            for unknown in module.annotations:
                text = text.replace(f'"{unknown} | None"', "None")
            parts.append(text)
        return parts

    def _import_lines(self) -> str:
        plain: set[str] = set()
        named: dict[str, list[str]] = {}
        for here, (module, name) in sorted(self.foreign.items()):
            renamed = "" if here == (name or module) else f" as {here}"
            if name:
                named.setdefault(module, []).append(f"{name}{renamed}")
            else:
                plain.add(f"import {module}{renamed}")
        lines = [f"from {module} import {', '.join(names)}" for module, names in sorted(named.items())]
        return "\n".join([*sorted(plain), *lines])


def _defined(node: ast.stmt) -> list[str]:
    """The names that a statement defines."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    inside = (target.elts if isinstance(target, ast.Tuple) else [target] for target in targets)
    return [target.id for group in inside for target in group if isinstance(target, ast.Name)]


def _walk(node: ast.AST, without: Collection[ast.AST]) -> Iterator[ast.AST]:
    yield node
    for child in ast.iter_child_nodes(node):
        if child not in without:
            yield from _walk(child, without)


def _initialises(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == INITIAL


def _lines_of(node: ast.stmt) -> range:
    first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
    return range(first, (node.end_lineno or first) + 1)
