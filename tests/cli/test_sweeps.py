"""`python -m genfound.train -m`: each job is done, or the table at the end says why it is not."""

from pathlib import Path

import pytest

from tests.cli.commands import TINY, genfound

SMALL = [*TINY, "data.images=300", "callbacks.preview.every=4000", "study=s"]


def table(output: str) -> dict[str, str]:
    """What a job varies -> the rest of its line in the last table."""
    lines = output[output.rindex("\njob ") + 1 :].splitlines()
    width = lines[0].index("ended")
    return {line[:width].strip(): line[width:] for line in lines[1:]}


def test_every_job_has_its_reason_though_it_cannot_be_composed(tmp_path: Path) -> None:
    jobs = ["-m", "model=nope,nit_tiny", "model.depth=deep,1", "objective.path=foo"]
    result = genfound("train", *jobs, *(word for word in SMALL if "model.depth" not in word), cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr == "error: 4 of 4 jobs are not done; the same command goes on with them\n"
    told = table(result.stdout)
    assert list(told) == [f"model={m} model.depth={d}" for m in ("nope", "nit_tiny") for d in ("deep", "1")]
    assert all(line.startswith("failed ") for line in told.values())
    reasons = ["model=nope is unknown; choose one of dit, ", "model=nope is unknown; choose one of dit, ",
               "model.depth=deep must be a whole number", "objective.path=foo is unknown; choose one of"]  # fmt: skip
    assert all(reason in line for reason, line in zip(reasons, told.values(), strict=True)), told
    assert len(list(tmp_path.glob("runs/s/*/FAILED"))) == 1  # of the one that could be composed
    assert not list(tmp_path.glob("runs/s/.sweep*"))


def test_a_key_that_only_some_models_have_fails_the_others(tmp_path: Path) -> None:
    result = genfound("train", "-m", "model.nope=1,2", "objective.path=foo", *SMALL, cwd=tmp_path)
    assert result.returncode == 1
    assert all("unknown key model.nope" in line for line in table(result.stdout).values()), result.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher", [[], ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]], ids=["basic", "joblib"]
)
def test_a_wrong_job_stops_no_other_and_the_same_command_goes_on(launcher: list[str], tmp_path: Path) -> None:
    command = ["-m", "model=nope,nit_tiny", "objective.path=foo,linear", *launcher, *SMALL, "trainer.max_steps=2"]
    first = genfound("train", *command, cwd=tmp_path)
    assert first.returncode == 1
    told = table(first.stdout)
    good = "model=nit_tiny objective.path=linear"
    assert [line.split()[0] for line in told.values()] == ["failed", "failed", "failed", "done"], first.stdout
    images, loss = told[good].split()[1:3]
    assert int(images) > 0 and float(loss) > 0
    metrics = next(tmp_path.glob("runs/s/*/DONE")).with_name("metrics.jsonl")
    before = metrics.read_text()
    again = genfound("train", *command, cwd=tmp_path)
    assert again.returncode == 1 and table(again.stdout)[good].startswith("done before"), again.stdout
    assert metrics.read_text() == before
