"""Figures of the averaged weights every so many images, each with its protocol."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lightning

from genfound import build
from genfound.callbacks.ema import Ema
from genfound.callbacks.every_n_images import EveryNImages
from genfound.callbacks.throughput import paused
from genfound.config import compose
from genfound.config.checks import image_sizes, one_of
from genfound.data.images.sets import digest
from genfound.evaluation.evaluator import EvaluationRequest, check, circumstances, make_protocol, sampling_config
from genfound.evaluation.extraction import guide_hash, network_hash, size_text
from genfound.evaluation.protocol import Result, SamplingRecord
from genfound.evaluation.provenance import pin_guide_checkpoint, sampling_record
from genfound.evaluation.references import RunDataset, Tool, Workspace, prepare_extractor, prepare_reference
from genfound.evaluation.samples import DATA, SampleStore, requests_by_rule
from genfound.loggers.base import log, note
from genfound.metrics.compute import check_count, check_reference, compute
from genfound.metrics.features import FeatureStore
from genfound.metrics.reference_stats import Reference
from genfound.modules.base import GenerativeModule
from genfound.runtime.files import remove
from genfound.runtime.processes import wait_until
from genfound.sampling.pipeline import Pipeline
from genfound.sampling.requests import SampleRequest, check_size
from genfound.tokenizers import Tokenizer

Size = tuple[int, int]


class Evaluation(EveryNImages):
    """Draws samples on every rank, measures them on the first; results go to the loggers and to evaluations/.

    Nothing of it reaches the training: weights are swapped back bit by bit, and no random number is taken from it.

    Args:
        every: images between two evaluations.
        protocol: an option of conf/protocol.
        extractor, extractor_weights: instead of the protocol's.
        folder: the run; every rank must see it.
        parts: of the run.
        ema: holds the average.

    Raises:
        ValueError: a protocol that does not fit the run.
    """

    def __init__(
        self,
        every: int,
        protocol: str,
        extractor: str | None,
        extractor_weights: str | None,
        folder: Path,
        parts: build.RunComponents,
        ema: Ema,
    ) -> None:
        super().__init__(every)
        self.folder, self.parts, self.ema = folder, parts, ema
        self.asked = asked(folder, parts.config, protocol, extractor, extractor_weights)
        config = self.asked.config
        check(config)
        references = Path(parts.config["runs"]) / ".references"
        self.place = Workspace(folder / "evaluations", references, 1, parts.config["trainer"]["accelerator"])
        self.work = self.place.out / "work/training"
        self.data = RunDataset(parts.config, parts.tokenizer.spec, len(parts.images.class_names))
        wanted = config["sizes"]
        self.sizes: list[Size | str] = [DATA] if wanted in (None, DATA) else list(image_sizes("sizes", wanted))
        unit = parts.tokenizer.spec.stride * parts.config["model"]["patch_size"]
        for size in self.sizes:
            if not isinstance(size, str):
                check_size(size, unit)
        self.tool: Tool | None = None
        self.references: dict[Size | str, tuple[Reference, dict[str, Any]]] = {}
        self.requests = {size: self._requests(size) for size in self.sizes}
        self.samplings = {size: self._sampling(size) for size in self.sizes}
        self.drawings = {size: self._drawing(size) for size in self.sizes}

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Continue the rhythm; make probe and references, or find them, on all ranks together."""
        super().on_train_start(trainer, module)
        self.place = replace(self.place, rank=trainer.global_rank, ranks=trainer.world_size)
        with paused(trainer, module):
            self._prepare()

    def on_interval(self, trainer: lightning.Trainer, module: GenerativeModule) -> None:
        """Evaluate at every size."""
        figures: dict[str, float] = {}
        for size in self.sizes:
            prefix = "eval" if len(self.sizes) == 1 else f"eval/{size_text(size)}"
            found = self._evaluate(trainer, module, size)
            figures |= {f"{prefix}/{name}": value for name, value in found.items()}
        if figures:
            log(trainer, {"images_seen": module.images_seen, **figures})

    def _prepare(self) -> None:
        config = self.asked.config
        self.tool = prepare_extractor(config, self.data, self.place)
        check_count(f"callbacks.evaluation.protocol={self.asked.protocol}", config["n"], self.tool.extractor)
        for size in self.sizes:
            self.references[size] = prepare_reference(config, size, self.data, self.tool, self.place)
            check_reference(self.references[size][0], self.tool.extractor, config["convention"])

    def _evaluate(self, trainer: lightning.Trainer, module: GenerativeModule, size: Size | str) -> dict[str, float]:
        """Figures on the first rank; nothing on the others, and where samples are not finite."""
        assert self.tool is not None
        share, reason = (trainer.global_rank, trainer.world_size), ""
        module.eval()
        with self.ema.ema_weights(module):
            weights = network_hash(module.net, self.parts.config)
            drawn = SampleStore(self.work / self._key(weights, size), self.requests[size])
            drawn.begin()
            try:
                drawn.draw(module.net, self.samplings[size], self.asked.config["seed"], *share)
            except FloatingPointError as error:
                reason = str(error)
        module.train()
        if not trainer.strategy.reduce_boolean_decision(not reason):
            note(trainer, f"no evaluation: {reason or 'samples of another process are not finite'}")
            return {}
        features = FeatureStore(drawn.folder / "features", len(drawn))
        features.extract(drawn, self.tool.extractor, *share)
        figures: dict[str, float] = {}
        if trainer.is_global_zero:
            wait_until(lambda: features.complete)
            figures = self._measure(drawn, features, size, {"images_seen": module.images_seen, "hash": weights})
            remove(self.work)  # with what interrupted evaluations have left
        wait_until(lambda: not drawn.folder.exists())
        trainer.strategy.barrier()  # nobody begins another folder while the first rank removes this one
        return figures

    def _measure(
        self, drawn: SampleStore, features: FeatureStore, size: Size | str, subject: dict[str, Any]
    ) -> dict[str, float]:
        assert self.tool is not None
        config, (reference, facts) = self.asked.config, self.references[size]
        device = self.samplings[size].device
        figures = compute(features, reference, self.tool.extractor, config["convention"], drawn.labels, device)
        protocol = make_protocol(self.asked, len(drawn), size, self.drawings[size], self.tool, facts)
        result = Result(figures, protocol, {"from": str(self.folder), **subject}, circumstances(device))
        result.append_to(self.place.out)
        return figures

    def _requests(self, size: Size | str) -> Sequence[SampleRequest]:
        config = self.asked.config
        named = self.data.images("train") if DATA in (size, config["labels"]) else None
        return requests_by_rule(config["n"], config["labels"], size, self.data.classes, config["seed"], named)

    def _how(self, size: Size | str) -> dict[str, Any]:
        return pin_guide_checkpoint(sampling_config(self.asked, self.parts.config, size))

    def _sampling(self, size: Size | str) -> Pipeline:
        parts, asked = self.parts, self.asked.config
        sampling = Pipeline.of(self._how(size), parts.objective, _decoder(parts), parts.device, asked["batch"])
        sampling.check(parts.net)
        return sampling

    def _drawing(self, size: Size | str) -> SamplingRecord:
        sampling = self.samplings[size]
        how = {**self._how(size), "sampler": sampling.sampler, "guidance": sampling.guidance}
        return sampling_record(self.asked.config, how, sampling.tokenizer, sampling.device, guide_hash(sampling))

    def _key(self, weights: str, size: Size | str) -> str:
        """Of the work on these weights: whatever could change an image or a feature."""
        assert self.tool is not None
        facts = [asdict(self.drawings[size]), self.asked.config["batch"], len(self.requests[size])]
        return digest(weights, size_text(size), self.tool.extractor.hash, json.dumps(facts))


def asked(
    folder: Path, run: Mapping[str, Any], protocol: str, extractor: str | None, extractor_weights: str | None
) -> EvaluationRequest:
    """What conf/evaluate.yaml asks for under a protocol.

    Raises:
        ValueError: there is no such protocol, or it does not say its reference.
    """
    known = sorted(file.stem for file in (Path(compose.config_dir()) / "protocol").glob("*.yaml"))
    one_of("callbacks.evaluation.protocol", protocol, known)
    config = compose.compose("evaluate", [f"protocol={protocol}"])
    own = {
        "from": str(folder),
        "extractor": extractor or config["extractor"],
        "extractor_weights": extractor_weights,
        "reference": DATA if config["reference"] == "???" else config["reference"],
        "weights": "raw" if run["ema"]["decays"] == [] else "ema",
        "batch": run["sample"]["batch"],
        "max_pixels": run["data"].get("max_pixels"),
    }
    return EvaluationRequest({**config, **own}, [], protocol)


def _decoder(parts: build.RunComponents) -> Tokenizer:
    """What decodes: also of a run on stored latents the tokenizer itself."""
    return build.tokenizer(parts.config) if build.reads_latents(parts.config) else parts.tokenizer
