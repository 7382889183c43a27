from pathlib import Path

import pytest
import torch

from genfound.evaluation.protocol import SamplingRecord
from genfound.evaluation.provenance import checkpoint_of, pin_guide_checkpoint, sampling_record
from genfound.runtime import checkpoint_io
from genfound.tokenizers import PixelTokenizer
from tests.helpers import composed


def run_of(folder: Path, *steps: int) -> Path:
    folder.mkdir()
    (folder / "config.yaml").touch()
    for step in steps:
        checkpoint_io.save({"global_step": step}, folder / f"checkpoints/{step}.ckpt")
    return folder


def test_a_run_is_one_checkpoint_of_it(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", 3, 20)
    assert checkpoint_of(run) == run / "checkpoints/20.ckpt"
    assert checkpoint_of(run / "checkpoints/3.ckpt") == run / "checkpoints/3.ckpt"
    assert pin_guide_checkpoint({"guidance": {"name": "autoguidance", "weights": str(run)}})["guidance"][
        "weights"
    ].endswith("20.ckpt")
    with pytest.raises(FileNotFoundError, match="new has no checkpoint yet"):
        checkpoint_of(run_of(tmp_path / "new"))


def drawing(*overrides: str, weak: str | None = None) -> SamplingRecord:
    config = composed("from=x", "reference=y", *overrides, name="evaluate")
    how = {
        **composed("tokenizer=pixel", "trainer.precision=fp32"),
        "sampler": config["sampler"],
        "guidance": config["guidance"],
    }
    return sampling_record(config, how, PixelTokenizer(), torch.device("cpu"), weak)


def test_the_images_of_a_call_count_where_the_sampler_couples_them() -> None:
    assert drawing("sampler=dopri5", "batch=12").batch == 12
    for sampler in (
        ["sampler=heun"],
        ["sampler=dopri5", "sampler.norm=image"],
        ["sampler=dopri5", "sampler.method=rk4"],
    ):
        assert drawing(*sampler, "batch=12").batch is None


def test_what_was_changed_of_the_network_is_told() -> None:
    assert drawing().rope is None
    assert drawing("rope.rule=yarn", "rope.trained=16").rope == {"rule": "yarn", "trained": 16}
    weaker = drawing("guidance=autoguidance", "guidance.weights=a", weak="123").guidance
    assert isinstance(weaker, dict) and weaker["hash"] == "123" and weaker["weights"] == "a"
