"""Official numbers: every fixture of a folder, through the adapter of its kind."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.golden.runner import COMMITTED, fixture_files, read, run


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    chosen: Path | None = metafunc.config.getoption("--golden-dir")
    folder = COMMITTED if chosen is None else metafunc.config.invocation_params.dir / chosen
    files = fixture_files(folder)
    names = [str(file.relative_to(folder).with_suffix("")) for file in files]
    metafunc.parametrize("file", files, ids=names)


def test_golden(file: Path) -> None:
    run(read(file))
