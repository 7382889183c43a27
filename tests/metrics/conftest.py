"""What tests of evaluations share."""

from pathlib import Path

import pytest
import torch

from tests.metrics.runs import untrained_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return untrained_run(tmp_path_factory.mktemp("evaluated") / "run")


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared, as a user's are: the probe is trained once."""
    return tmp_path_factory.mktemp("references")
