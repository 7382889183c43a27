"""The processes of a group agree on the step after which they stop."""

import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch.distributed as dist

from genfound.callbacks import stopping
from genfound.config.environment import LAUNCH
from genfound.runtime.stopping import NOW, StopRequest, ask


def trainer(step: int) -> Any:
    return SimpleNamespace(global_step=step, should_stop=False, world_size=2, max_steps=-1)


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[stopping.Stopping]:
    """Two processes of a launch, of which the first sees that it is to end."""
    store = dist.HashStore()
    monkeypatch.setattr(stopping, "_get_default_store", lambda: store)
    monkeypatch.setenv(LAUNCH, str(tmp_path))
    first = stopping.Stopping()
    monkeypatch.delenv(LAUNCH)
    ask(tmp_path, signal.SIGTERM)
    return [first, stopping.Stopping()]


def step(process: stopping.Stopping, number: int) -> bool:
    """Whether a process stops after a step."""
    at = trainer(number)
    process.on_train_batch_end(at, cast(Any, None))
    return bool(at.should_stop)


def test_all_stop_after_the_step_that_the_first_has_named(group: list[stopping.Stopping]) -> None:
    for process in reversed(group):
        assert not step(process, 7)
    for process in group:
        assert not step(process, 8)
    for process in group:
        assert step(process, 9) and process.signal == signal.SIGTERM


def test_a_process_that_is_ahead_says_so_and_ends(
    group: list[stopping.Stopping], capsys: pytest.CaptureFixture[str]
) -> None:
    assert not step(group[0], 7)
    with pytest.raises(SystemExit) as end:
        step(group[1], 10)
    assert end.value.code == 143
    assert "step 10 is after step 9, where all were to stop: no checkpoint is made" in capsys.readouterr().out


def test_a_signal_that_the_scheduler_sends_to_all_is_no_second_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LAUNCH, str(tmp_path))
    request = StopRequest()
    request.listen()
    try:
        ask(tmp_path, signal.SIGTERM)
        assert request.asked() == signal.SIGTERM
        signal.raise_signal(signal.SIGTERM)
        (tmp_path / NOW).touch()
        with pytest.raises(SystemExit):
            signal.raise_signal(signal.SIGTERM)
    finally:
        request.close()


def test_a_second_signal_ends_the_process_at_once_and_an_echo_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    request = StopRequest()
    request.listen()
    try:
        assert request.asked() == 0
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert request.asked() == signal.SIGTERM
        monkeypatch.setattr("genfound.config.signals.ECHO", 0)
        with pytest.raises(SystemExit):
            signal.raise_signal(signal.SIGTERM)
        monkeypatch.undo()
        with pytest.raises(SystemExit) as end:
            signal.raise_signal(signal.SIGINT)
        assert end.value.code == 130
    finally:
        request.close()
    assert signal.getsignal(signal.SIGTERM) is before
