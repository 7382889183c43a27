"""The lists of versions agree, and what is installed lies within the bounds that users get."""

from __future__ import annotations

import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
REQUIRED = [Requirement(line) for line in (*PROJECT["dependencies"], *EXTRAS["report"], *EXTRAS["teachers"])]


def pinned(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


@pytest.mark.parametrize("required", REQUIRED, ids=lambda required: required.name)
def test_lower_bounds_are_the_versions_of_the_lowest_test(required: Requirement) -> None:
    bounds = {str(bound.operator): Version(bound.version) for bound in required.specifier}
    assert bounds[">="] == Version(pinned("constraints-lowest.txt")[required.name])
    assert pinned("constraints.txt")[required.name] in required.specifier
    assert version(required.name) in required.specifier


def test_the_tools_are_the_same() -> None:
    usual, lowest = pinned("constraints.txt"), pinned("constraints-lowest.txt")
    tools = lowest.keys() - {required.name for required in REQUIRED}
    assert tools
    assert {name: usual[name] for name in tools} == {name: lowest[name] for name in tools}


def test_hydra_has_an_upper_bound() -> None:
    """Its next minor version may change how the command line is read."""
    hydra = next(required for required in REQUIRED if required.name == "hydra-core")
    assert not hydra.specifier.contains("1.4.0", prereleases=True)
    assert not hydra.specifier.contains("1.4.0rc3", prereleases=True)
