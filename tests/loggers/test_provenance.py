from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from genfound.loggers import provenance
from genfound.loggers.json_lines import lines_of
from genfound.loggers.provenance import commit, is_checkout

OWN = '[project]\nname = "genfound"\n'


def repository(folder: Path) -> str:
    """A repository of one commit; its name."""
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "-q"], ["add", "."], [*identity, "commit", "-q", "-m", "one"]):
        subprocess.run(["git", *arguments], cwd=folder, check=True)
    return subprocess.check_output(["git", "rev-parse", "--short=12", "HEAD"], cwd=folder, text=True).strip()


def test_the_commit_is_that_of_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pyproject.toml").write_text(OWN)
    name = repository(tmp_path)
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "another"))  # as inside a hook of another repository
    assert is_checkout(tmp_path) and commit(tmp_path) == name
    (tmp_path / "pyproject.toml").write_text(OWN + "#")
    assert commit(tmp_path) == f"{name}-dirty"


def test_a_repository_around_an_installation_is_not_the_one_of_genfound(tmp_path: Path) -> None:
    inside = tmp_path / "env/lib/python3.12"
    inside.mkdir(parents=True)
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "thesis"\n')
    repository(tmp_path)
    assert not is_checkout(inside) and not is_checkout(tmp_path)


def test_without_git_there_is_no_commit_and_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(provenance, "is_checkout", lambda _: True)
    assert "commit" not in provenance.provenance() and "torch" in provenance.provenance()


def test_a_run_keeps_what_has_trained_it_from_which_step_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step, code in (
        (0, "one"),
        (4, "one"),
        (6, "two"),
        (9, "three"),
        (7, "three"),
    ):  # the last one goes on after a kill
        monkeypatch.setattr(provenance, "provenance", lambda code=code: {"commit": code})
        assert provenance.note(tmp_path, step) == {"commit": code}
    kept = [(line["step"], line["commit"]) for line in lines_of(tmp_path / provenance.FILE)]
    assert kept == [(0, "one"), (6, "two"), (7, "three")]
