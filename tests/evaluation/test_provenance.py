from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from genfound import build
from genfound.checkpoints.load import newest_checkpoint
from genfound.evaluation.protocol import SamplingRecord
from genfound.evaluation.provenance import network_hash, sampling_record
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
    assert newest_checkpoint(run) == run / "checkpoints/20.ckpt"
    assert newest_checkpoint(run / "checkpoints/3.ckpt") == run / "checkpoints/3.ckpt"
    with pytest.raises(FileNotFoundError, match="new has no checkpoint yet"):
        newest_checkpoint(run_of(tmp_path / "new"))


def drawing(*overrides: str, guided: bool = False) -> SamplingRecord:
    config = composed("from=x", "reference=y", *overrides, name="evaluate")
    guide = nn.Linear(1, 1) if guided else None
    pipeline: Any = SimpleNamespace(
        sampler=build.sampler(config), guide=guide, tokenizer=PixelTokenizer(), precision="32-true", uint8="round"
    )
    return sampling_record(config, {**composed("tokenizer=pixel"), "guidance": config["guidance"]}, pipeline)


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
    weaker = drawing("guidance=autoguidance", "guidance.weights=a", guided=True).guidance
    assert isinstance(weaker, dict) and len(weaker["hash"]) == 16 and weaker["weights"] == "a"


def test_the_hash_of_a_network_follows_what_it_computes() -> None:
    net: Any = nn.Linear(2, 2)
    hashes = [
        network_hash(net, {"model": {"heads": heads, "attention": backend}})
        for heads, backend in ((2, "loop"), (2, "flex"), (4, "loop"))
    ]
    assert hashes[0] == hashes[1] != hashes[2]
