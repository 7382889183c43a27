"""What tests of evaluations share."""

from pathlib import Path

import pytest
import torch

from tests.evaluation.runs import evaluated, untrained_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return untrained_run(tmp_path_factory.mktemp("evaluated") / "run")


@pytest.fixture(scope="module")
def references(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared, as a user's are: the probe of the run is trained once, with a reference of it."""
    folder = tmp_path_factory.mktemp("references")
    evaluated(run, folder, sizes=[16, 16], out=str(tmp_path_factory.mktemp("first")))
    return folder
