"""A run that was never trained, and evaluations of it in this process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from genfound import build
from genfound.config import command_line
from genfound.evaluate import _origin
from genfound.evaluation.evaluator import evaluate
from genfound.evaluation.protocol import EvaluationRequest, Result
from genfound.metrics.reference_stats import reference_note
from genfound.runtime import checkpoint_io, run_directory
from genfound.tokenizers import PixelTokenizer
from tests.helpers import composed, run_dir

TINY = [
    "model.width=32", "model.depth=1", "model.heads=1", "data.images=300", "data.holdout=100", "data.sides=[12,16]",
    "data.max_tokens=256", "batch.packs=1", "sampler=euler", "sampler.steps=2", "sample.batch=4", "logger=jsonl",
]  # fmt: skip


def untrained_run(folder: Path, *overrides: str, of: Sequence[str] = TINY) -> Path:
    """A run directory with a checkpoint of initial weights, whose average differs from them."""
    run_dir(folder, *of, *overrides)
    config = run_directory.read_config(folder)
    images = build.source(config, PixelTokenizer.spec, "train")
    net = build.net(config, PixelTokenizer.spec, len(images.class_names))
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    average = {name: tensor + 0.01 for name, tensor in state.items()}
    content = {
        "global_step": 3,
        "images_seen": 48,
        "state_dict": {f"net.{name}": tensor for name, tensor in state.items()},
        "ema": {"0.9": average},
        "run": {"class_names": images.class_names, "sizes": [[16, 16], [12, 16]], "fingerprint": images.fingerprint},
    }
    checkpoint_io.save(content, folder / "checkpoints/step-00000003.ckpt")
    return folder


def evaluated(
    source: Path, references: Path, *overrides: str, protocol: str = "adm_50k", **settings: Any
) -> list[Result]:
    """What `python -m genfound.evaluate from=SOURCE ...` gives, on the CPU with a probe."""
    chosen = [f"protocol={protocol}", *overrides]
    origin = [f"from={command_line._quoted(str(source))}", "reference=data"]
    config = composed(*command_line.with_origin(_origin, [*origin, *chosen]), name="evaluate")
    defaults = {"references": str(references), "accelerator": "cpu", "precision": "fp32", "batch": 4, "n": 96}
    defaults |= {"extractor": "probe", "reference_view": "as_is"}
    return evaluate(EvaluationRequest({**config, **defaults, **settings}, chosen, protocol))


def probe(references: Path) -> str:
    """The probe of the run."""
    return str(next(references.glob("probe-*.safetensors")))


def of_probe(references: Path) -> str:
    """A reference of the probe."""
    files = references.glob("*.npz")
    return str(next(file for file in files if (reference_note(file) or {})["extractor"]["name"] == "probe"))
