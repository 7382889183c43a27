"""One adapter for each (topic, kind) of golden fixtures: official arguments in, results of this project out.

A module of this package registers its adapters when it is imported; all modules are.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

Results = Mapping[str, Any]
Run = Callable[[Mapping[str, Any]], Results]


class Adapter(NamedTuple):
    """How to compute what fixtures of a kind expect.

    Attributes:
        run: fixture -> results, under the names of its outputs.
        notes: keys of `outputs` that hold remarks, not outputs.
    """

    run: Run
    notes: tuple[str, ...]


ADAPTERS: dict[tuple[str, str], Adapter] = {}


def adapter(topic: str, kind: str, notes: tuple[str, ...] = ()) -> Callable[[Run], Run]:
    """Register a function as the adapter of a kind."""

    def register(run: Run) -> Run:
        assert (topic, kind) not in ADAPTERS
        ADAPTERS[topic, kind] = Adapter(run, notes)
        return run

    return register


def sizes_of(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Our options for the sizes among the official constructor arguments that DiT and its descendants share."""
    names = {"channels": "in_channels", "width": "hidden_size", "heads": "num_heads"}
    same = ("num_classes", "patch_size", "depth", "mlp_ratio")
    return {ours: arguments[theirs] for ours, theirs in {**names, **{name: name for name in same}}.items()}


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
