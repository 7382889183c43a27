"""Results against the numbers of a golden fixture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

RELATIVE, FLOOR = 1e-4, 3e-6
SUMMARIES = ("mean", "std", "abs_max")


def expected(fixture: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that a fixture wants to see: its outputs, its gradients, and the rows of a table."""
    wanted = dict(fixture.get("outputs") or {})
    wanted |= {f"gradients.{key}": entry for key, entry in (fixture.get("gradients") or {}).items()}
    return wanted | ({"rows": {"exact": fixture["rows"]}} if "rows" in fixture else {})


def differences(fixture: Mapping[str, Any], results: Mapping[str, Any], notes: tuple[str, ...] = ()) -> list[str]:
    """One line for each wanted output that is absent or off; `notes` are keys that are remarks, not outputs."""
    found: list[str] = []
    for name, entry in expected(fixture).items():
        if name in notes:
            continue
        if name not in results:
            found.append(f"{name}: not computed")
            continue
        found += [f"{name}: {problem}" for problem in _problems(fixture, name, entry, plain(results[name]))]
    return found


def tolerance(fixture: Mapping[str, Any], name: str, abs_max: float) -> float:
    """The largest absolute difference allowed in an output."""
    if "tolerance" in fixture:
        return float(fixture["tolerance"]) * abs_max
    floor = fixture.get("noise_floor")
    if isinstance(floor, Mapping):
        floor = floor.get(name.removeprefix("gradients."))
    return RELATIVE * abs_max if floor is None else max(20 * float(floor), FLOOR * abs_max)


def plain(value: Any) -> Any:
    """Tensors, arrays and tuples as arrays and lists."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        return (value.double() if value.is_floating_point() else value).numpy()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _problems(fixture: Mapping[str, Any], name: str, entry: Any, result: Any) -> list[str]:
    if isinstance(entry, Mapping) and "exact" in entry:
        return _exact(entry["exact"], result)
    if isinstance(entry, Mapping) and "value" in entry:
        return _problems(fixture, name, entry["value"], result)
    if isinstance(entry, Mapping) and ("shape" in entry or "values" in entry):
        return _numbers(fixture, name, entry, np.asarray(result))
    if isinstance(entry, Mapping):
        return [] if entry == result else [f"differs in {sorted(_changed(entry, result))}"]
    numbers = np.asarray(entry)
    if numbers.dtype.kind == "f":
        return _numbers(fixture, name, {"values": numbers.ravel(), "shape": list(numbers.shape)}, np.asarray(result))
    return _exact(entry, result)


def _exact(wanted: Any, result: Any) -> list[str]:
    result = result.tolist() if isinstance(result, np.ndarray) else result
    if wanted == result and isinstance(wanted, bool) == isinstance(result, bool):
        return []
    if isinstance(wanted, list) and isinstance(result, list) and len(wanted) == len(result):
        i = next(i for i, (a, b) in enumerate(zip(wanted, result, strict=True)) if a != b)
        return [f"element {i} is {_short(result[i])}, not {_short(wanted[i])}"]
    if isinstance(wanted, Mapping) and isinstance(result, Mapping):
        return [f"differs in {sorted(_changed(wanted, result))}"]
    return [f"is {_short(result)}, not {_short(wanted)}"]


def _numbers(fixture: Mapping[str, Any], name: str, entry: Mapping[str, Any], result: np.ndarray) -> list[str]:
    shape = entry.get("shape")
    if shape is not None and list(result.shape) != list(shape):
        return [f"has shape {list(result.shape)}, not {shape}"]
    wanted = np.asarray(entry.get("values", [])).ravel()
    abs_max = entry.get("abs_max", float(np.abs(wanted).max(initial=0)))
    allowed = tolerance(fixture, name, abs_max)
    found = _values(entry, wanted, result, allowed) if "values" in entry else []
    numbers = result.ravel().astype(np.float64)
    ours = {"mean": numbers.mean(), "std": numbers.std(), "abs_max": np.abs(numbers).max()} if numbers.size else {}
    for summary in SUMMARIES:
        if summary in entry and not abs(ours.get(summary, math.nan) - entry[summary]) <= allowed:
            found.append(f"{summary} is {ours.get(summary, math.nan):.7g}, not {entry[summary]:.7g}")
    return found


def _values(entry: Mapping[str, Any], wanted: np.ndarray, result: np.ndarray, allowed: float) -> list[str]:
    stride = entry.get("stride", 1)
    picked = result.ravel()[::stride]
    if picked.shape != wanted.shape:
        return [f"has {picked.size} values, not {wanted.size}"]
    if wanted.dtype.kind in "iub" and picked.dtype.kind in "iub":
        return _exact(wanted.tolist(), picked.tolist())
    off = np.abs(picked.astype(np.float64) - wanted.astype(np.float64))
    if (off <= allowed).all():  # not true of what is not a number
        return []
    worst = int(np.argmax(np.nan_to_num(off, nan=math.inf)))
    size = f"off by {off[worst]:.1e}, {allowed:.1e} allowed"
    return [f"value {worst * stride} is {picked[worst]:.7g}, not {wanted[worst]:.7g} ({size})"]


def _changed(wanted: Mapping[str, Any], result: Any) -> set[str]:
    result = result if isinstance(result, Mapping) else {}
    return {str(key) for key in wanted.keys() | result.keys() if wanted.get(key) != result.get(key)}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
