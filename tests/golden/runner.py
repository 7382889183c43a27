"""Runs one golden fixture through the adapter of its kind."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.golden.adapters import ADAPTERS
from tests.golden.compare import differences

COMMITTED = Path(__file__).parent / "fixtures"


def fixture_files(folder: Path) -> list[Path]:
    """Every fixture below a folder; there must be one."""
    files = sorted(folder.rglob("*.json"))
    if not files:
        raise pytest.UsageError(f"--golden-dir={folder}: there is no JSON file below it")
    return files


def read(file: Path) -> dict[str, Any]:
    """A fixture."""
    fixture = json.loads(file.read_text())
    missing = {"topic", "kind", "level"} - set(fixture)
    if missing:
        pytest.fail(f"{file} is not a golden fixture: it has no {', '.join(sorted(missing))}")
    return dict(fixture)


def run(fixture: Mapping[str, Any]) -> None:
    """Fail where a number is off; a part alone that nothing runs yet is an expected failure, never a pass."""
    topic, kind, level = fixture["topic"], fixture["kind"], fixture["level"]
    adapter = ADAPTERS.get((topic, kind))
    if adapter is None and level == "required":
        pytest.fail(f"a required fixture without an adapter: topic {topic}, kind {kind}", pytrace=False)
    if adapter is None:
        pytest.xfail(f"{level}, topic {topic}, kind {kind}")
    try:
        results = adapter.run(fixture)
    except NotImplementedError as error:
        pytest.fail(f"topic {topic}, kind {kind}: {error}", pytrace=False)
    wrong = differences(fixture, results, adapter.notes)
    if wrong:
        pytest.fail("\n".join([f"topic {topic}, kind {kind}: {fixture.get('what', '')}", *wrong]), pytrace=False)
