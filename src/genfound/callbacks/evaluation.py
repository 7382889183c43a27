"""Figures of the averaged weights every so many images, each with its protocol."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning import Trainer

from genfound import build
from genfound.callbacks.ema import averaged
from genfound.callbacks.every_n_images import EveryNImages
from genfound.callbacks.throughput import paused
from genfound.config import compose
from genfound.config.checks import one_of
from genfound.evaluation.evaluator import Evaluator
from genfound.evaluation.protocol import EvaluationRequest, size_text
from genfound.evaluation.references import RunDataset, Workspace
from genfound.evaluation.samples import new_samples
from genfound.loggers.base import log, note
from genfound.modules.base import GenerativeModule
from genfound.runtime.files import remove
from genfound.sampling.requests import DATA


class Evaluation(EveryNImages):
    """Evaluates on all ranks; results go to the loggers and to evaluations/.

    Nothing of it reaches the training: weights are swapped back bit by bit, and no random number is taken from it.

    Args:
        every: images between two evaluations.
        protocol: an option of conf/protocol.
        extractor, extractor_weights: instead of the protocol's.
    """

    def __init__(self, every: int, protocol: str, extractor: str | None, extractor_weights: str | None) -> None:
        super().__init__(every)
        self.options = protocol, extractor, extractor_weights

    def setup(self, trainer: Trainer, module: GenerativeModule, stage: str) -> None:
        """What is asked for, in the run directory, which every rank must see."""
        self.folder = folder = Path(trainer.default_root_dir)
        parts: build.RunComponents = trainer.datamodule.parts  # type: ignore[attr-defined]
        config, spec, device = parts.config, parts.tokenizer.spec, parts.device
        self.request = training_request(folder, config, *self.options)
        self.request.check()
        self.references, self.device = Path(config["runs"]) / ".references", device
        self.dataset = RunDataset(config, spec, len(parts.images.class_names))
        codec = build.tokenizer(config) if build.reads_latents(config) else parts.tokenizer
        unit = spec.stride * config["model"]["patch_size"]
        sizes = self.request.sizes((unit, unit), unit)
        self.plans = [new_samples(self.request, parts.net, codec, size, self.dataset, device) for size in sizes]

    def on_train_start(self, trainer: Trainer, module: GenerativeModule) -> None:
        """Continue the rhythm; make probe and references, or find them, on all ranks together."""
        super().on_train_start(trainer, module)
        out, place = self.folder / "evaluations", (trainer.global_rank, trainer.world_size, trainer.strategy.barrier)
        self.workspace = Workspace(out, out / "work/training", self.references, self.device, *place, quiet=True)
        with paused(trainer, module):
            sizes, n = (plan.size for plan in self.plans), self.request.config["n"]
            self.evaluator = Evaluator(self.request, self.workspace, sizes, n, self.dataset)

    def on_interval(self, trainer: Trainer, module: GenerativeModule) -> None:
        """Evaluate at every size."""
        figures: dict[str, float] = {}
        subject = {"from": str(self.folder), "images_seen": module.images_seen}
        with averaged(trainer, module):
            for plan in self.plans:
                prefix = "eval" if len(self.plans) == 1 else f"eval/{size_text(plan.size)}"
                try:
                    result = self.evaluator.run(plan.of(module.net, subject, self.workspace.work))
                except FloatingPointError as error:
                    note(trainer, f"no evaluation: {error}")
                    continue
                if result is not None:
                    figures |= {f"{prefix}/{name}": value for name, value in result.figures.items()}
        if trainer.is_global_zero:
            remove(self.workspace.work)  # with what interrupted evaluations have left
        if figures:
            log(trainer, {"images_seen": module.images_seen, **figures})


def training_request(
    folder: Path, run: Mapping[str, Any], protocol: str, extractor: str | None, extractor_weights: str | None
) -> EvaluationRequest:
    """What conf/evaluate.yaml asks for under a protocol."""
    one_of("callbacks.evaluation.protocol", protocol, compose.option_names("protocol"))
    config = compose.compose("evaluate", [f"protocol={protocol}"])
    own = {
        "sampler": run["sampler"],
        "guidance": run["guidance"],
        "from": str(folder),
        "sizes": config["sizes"] or DATA,
        "extractor": extractor or config["extractor"],
        "extractor_weights": extractor_weights,
        "reference": DATA if config["reference"] == "???" else config["reference"],
        "weights": "raw" if run["ema"]["decays"] == [] else "ema",
        "batch": run["sample"]["batch"],
        "max_pixels": run["data"].get("max_pixels"),
    }
    return EvaluationRequest({**config, **own}, [], protocol)
