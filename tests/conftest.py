"""What every test gets: one thread, no network, no graphics card unless it asks for one."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from hypothesis import settings

from genfound.config import compose

settings.register_profile("same_everywhere", deadline=None, derandomize=True, database=None)
settings.load_profile("same_everywhere")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden-dir",
        type=Path,
        default=None,
        help="run the golden fixtures below this folder instead of the committed ones",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """List the golden aids that nothing runs yet, so that they are not mistaken for passed ones."""
    waiting = [r for r in terminalreporter.stats.get("xfailed", []) if "tests/golden" in r.nodeid]
    if waiting:
        terminalreporter.section("golden fixtures without an adapter (not counted as passed)")
        for report in sorted(waiting, key=lambda r: r.nodeid):
            terminalreporter.write_line(f"{report.nodeid.partition('[')[2][:-1]}: {report.wasxfail}")


@pytest.fixture(autouse=True)
def _plain_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _composed_once() -> Iterator[None]:
    """Hydra takes 0.3 s for a composition, and tests ask for the same ones again and again."""
    plain = compose.compose
    known = functools.cache(lambda folder, name, overrides: plain(name, overrides))

    def composed(name: str, overrides: Sequence[str]) -> dict[str, Any]:
        if GlobalHydra.instance().is_initialized():
            return plain(name, overrides)
        return copy.deepcopy(known(compose.config_dir(), name, tuple(overrides)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compose, "compose", composed)
        yield


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """torch.compile without what earlier tests have compiled."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
