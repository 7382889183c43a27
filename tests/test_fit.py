from __future__ import annotations

from pathlib import Path

import pytest

from genfound.fit import fit
from tests.cli.commands import TINY
from tests.helpers import run_dir

WRONG = {
    "sampler.steps=0": r"sampler\.steps=0 must be a whole number of at least 1",
    "guidance.interval=[0.7,0.2]": r"guidance\.interval=.* low <= high",
    "model.label_drop=0": r"guidance needs a null label: .* guidance=none",
    "objective=gaussian_x0 sampler=ddim objective.timesteps=30 sampler.steps=40": "40 steps cannot be chosen from 30",
}


@pytest.mark.parametrize("options", WRONG)
def test_settings_of_previews_are_checked_before_the_first_step(options: str, tmp_path: Path) -> None:
    folder = run_dir(tmp_path, *TINY, *options.split(), "trainer.max_steps=1", "logger=jsonl")
    with pytest.raises(ValueError, match=WRONG[options]):
        fit(folder)
    assert not (tmp_path / "checkpoints").exists()
