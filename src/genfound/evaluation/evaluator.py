"""Evaluation: samples, their features, the figures, and the protocol without which no figure leaves.

One program on every process: each makes its share of the files of samples, waits for the others', and makes its share
of the files of features; the first one measures. What is in files goes on there after an interruption.
"""

import contextlib
import json
import os
import platform
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from genfound.checkpoints.load import hints_of, load, newest_checkpoint
from genfound.config.command_line import explain_oom
from genfound.evaluation import protocol
from genfound.evaluation.export import check_target, export
from genfound.evaluation.protocol import LIBRARIES, UNKNOWN, EvaluationRequest, Protocol, Result, size_text
from genfound.evaluation.provenance import is_images, model_identity
from genfound.evaluation.references import DECODED, GIVEN, RunDataset, Workspace, prepare_extractor, prepare_reference
from genfound.evaluation.samples import EvaluationSamples, SampleStore, existing_samples, new_samples
from genfound.loggers.provenance import provenance, versions
from genfound.metrics.clip_score import ClipScore
from genfound.metrics.compute import PROBE, check_count, check_reference, compute
from genfound.metrics.features import FeatureStore
from genfound.runtime import devices, launch, processes
from genfound.runtime.files import check_folder, lock, remove
from genfound.runtime.progress import no_progress, shared_progress
from genfound.sampling.requests import Size
from genfound.tokenizers import Undecodable


class Evaluator:
    """Measures n samples of some sizes, also again and again as their network trains.

    The references, which all processes make together unless they are there, come with what the protocol says of them.
    """

    def __init__(
        self, request: EvaluationRequest, workspace: Workspace, sizes: Iterable[Size | str], n: int,
        dataset: RunDataset | None,
    ) -> None:  # fmt: skip
        self.request, self.workspace, config = request, workspace, request.config
        self.extractor = prepare_extractor(config, dataset, workspace)
        check_count("n", n, self.extractor)
        clip = config["clip_weights"] if workspace.rank == 0 else None
        self.clip = None if clip is None else ClipScore(clip, workspace.device)
        self.references = {}
        for size in sizes:
            self.references[size] = prepare_reference(config, size, dataset, self.extractor, workspace)
            check_reference(self.references[size][0], self.extractor, config["convention"])

    def run(self, samples: EvaluationSamples, export_to: str | None = None) -> Result | None:
        """Samples, features, figures; the result, stored, on the first process. What took long is removed.

        All processes that share the work call this; on all, a sample that is not finite raises a FloatingPointError.
        """
        workspace = self.workspace
        with lock(samples.work) if workspace.rank == 0 else contextlib.nullcontext():
            workspace.barrier()
            try:
                if isinstance(samples.images, SampleStore):
                    title = "" if workspace.quiet else f"{size_text(samples.size)}, {samples.record.summary()}"
                    samples.images.make(workspace.rank, workspace.ranks, title)
            except FloatingPointError:
                workspace.barrier()
                if workspace.rank == 0:
                    remove(samples.work)
                raise
            result = self._measure(samples, export_to)
        workspace.barrier()  # nobody begins other work while the first process removes this
        return result

    def _measure(self, samples: EvaluationSamples, export_to: str | None) -> Result | None:
        """Features by all processes, figures by the first, and the others wait."""
        config, images, workspace, device = self.request.config, samples.images, self.workspace, self.workspace.device
        features = FeatureStore(samples.work / f"features-{self.extractor.hash}-{len(images)}", len(images))
        place = workspace.rank, workspace.ranks
        progress = no_progress if workspace.quiet else shared_progress("features", *place)
        features.extract(images, self.extractor, *place, progress)
        if workspace.rank:
            processes.wait_until(lambda: config["keep"] or not samples.work.exists())
            return None
        processes.wait_until(lambda: features.complete)
        if export_to is not None:
            note = {"drawing": asdict(samples.record), "subject": dict(samples.subject), "size": samples.size}
            print(f"samples: {export(images, export_to, note)}", flush=True)
        reference, facts = self.references[samples.size]
        figures = compute(features, reference, self.extractor, config["convention"], images.labels, device)
        if self.clip is not None:
            figures["clip_score"] = self.clip(images, images.prompts)  # type: ignore[attr-defined]
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
        machine = {"device": name or platform.machine(), "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        result = Result(figures, self._protocol(samples, facts), samples.subject, {**provenance(), **machine})
        result.append_to(workspace.out)
        if not workspace.quiet:
            print("\n".join(result.lines()), flush=True)
        if not config["keep"]:
            remove(samples.work)
        return result

    def _protocol(self, samples: EvaluationSamples, facts: Mapping[str, Any]) -> Protocol:
        """What was set otherwise than its name says is listed."""
        request, view, count = self.request, str(facts["view"]), len(samples.images)
        clip = {} if self.clip is None else {"clip": self.clip.hash}
        named = dict.fromkeys(("reference_view", "reference_images"), UNKNOWN)  # of images in no view
        used = named if view == GIVEN else {"reference_view": view.removesuffix(DECODED)}
        return Protocol(
            name=request.protocol,
            altered=request.changed_keys(samples.record, {**used, "n": count}),
            count=count,
            size=samples.size if isinstance(samples.size, str) else list(samples.size),
            drawing=samples.record,
            extractor={"name": self.extractor.name, "hash": self.extractor.hash, **clip},
            convention=PROBE if self.extractor.name == PROBE else request.config["convention"],
            reference=facts,
            versions=versions(*LIBRARIES),
            order=samples.order,
        )


def evaluate(request: EvaluationRequest, place: processes.RankInfo = processes.SINGLE_PROCESS) -> list[Result]:
    """Evaluate at each size, as every process that shares the work does; the first prints, stores, returns results."""
    config, source, dataset = request.config, Path(request.config["from"]), None
    request.check()
    workspace = _workspace(config, source, place)
    earlier = _earlier_results(config, workspace)
    if is_images(source):
        request = replace(request, overrides=[])  # their sampler and guidance are what they were
        samples = [existing_samples(config, source, workspace.work)]
    else:
        dataset, samples = _of_model(request, newest_checkpoint(source), workspace)
    targets = _targets(config["export"], samples)
    evaluator = Evaluator(request, workspace, (each.size for each in samples), len(samples[0].images), dataset)
    made = [evaluator.run(each, target) for each, target in zip(samples, targets, strict=True)]
    results = [result for result in made if result is not None]
    if len(results) + len(earlier) > 1:
        print("\n".join(["", *protocol.table([*results, *earlier])]), flush=True)
    return results


def evaluate_on_devices(request: EvaluationRequest) -> None:
    """Evaluate in this process, or in `devices` of them."""
    request.check()
    config, source = request.config, Path(request.config["from"])
    device = devices.device(config["accelerator"])
    count = config["devices"] or (torch.cuda.device_count() if device.type == "cuda" else 1)
    if count == 1:
        evaluate(request)
        return
    if not is_images(source):
        request = replace(request, config={**config, "from": str(newest_checkpoint(source))})
    # kernels may sum in another order with other numbers of threads
    environment = {"OMP_NUM_THREADS": str(torch.get_num_threads())} if device.type == "cpu" else {}
    launch.launch("genfound.evaluation.evaluator", asdict(request), count, **environment)


def _workspace(config: Mapping[str, Any], source: Path, place: processes.RankInfo) -> Workspace:
    """Where this evaluation works: in the folder of its study, in the run, or beside the images or the file."""
    run = source.parent.parent if source.suffix == ".ckpt" else source
    named = source if source.name not in ("", "..") else source.resolve()
    beside = named.parent / f"{named.name}.evaluations"
    own = run / "evaluations" if (run / "config.yaml").is_file() else beside
    study = config["study"] and Path(config["runs"]) / config["study"] / (named if own == beside else run).name
    out = Path(config["out"] or study or own)
    references = Path(config["references"])
    check_folder("out", out)
    check_folder("references", references)
    rank, ranks, local_rank = place
    group = () if ranks == 1 else (rank, ranks, distributed.barrier)
    device = devices.device(config["accelerator"], local_rank if group else None)
    return Workspace(out, out / "work", references, device, *group)


def _of_model(
    request: EvaluationRequest, source: Path, workspace: Workspace
) -> tuple[RunDataset, list[EvaluationSamples]]:
    """The data of a model where they are now, and the samples that it is to make, at each size."""
    config = request.config
    model = load(source, weights=config["weights"], trust=config["trust"], **hints_of(config))
    if isinstance(model.tokenizer, Undecodable):
        raise ValueError(model.tokenizer.reason)
    model.net.reposition(config["rope"])
    moved = {key: str(value) for key, value in config["data"].items() if value is not None}
    foreign = sorted(moved.keys() - model.config["data"].keys())
    if foreign:
        raise ValueError(f"data.{foreign[0]} is not an option of the data of {config['from']}")
    run = {**model.config, "data": {**model.config["data"], **moved}}
    dataset = RunDataset(run, model.tokenizer.spec, len(model.class_names))
    sizes = request.sizes(model.sizes[0], model.tokenizer.spec.stride * run["model"]["patch_size"])
    if len(sizes) > 1:
        print(f"{len(sizes)} sizes, {config['n']:,} samples of each; sizes=... chooses", flush=True)
    net, subject = model.net.to(workspace.device), model_identity(source)
    plans = [new_samples(request, net, model.tokenizer, size, dataset, workspace.device) for size in sizes]
    samples = [plan.of(net, subject, workspace.work) for plan in plans]
    if workspace.ranks > 1:
        found: list[Any] = [None] * workspace.ranks
        distributed.all_gather_object(found, [str(each.work) for each in samples])
        if any(other != found[0] for other in found):
            raise ValueError("the checkpoint of from=... or guidance.weights=... has changed; give the command again")
    return dataset, samples


def _earlier_results(config: Mapping[str, Any], workspace: Workspace) -> list[Result]:
    """The results to compare with; those that the new ones join are read too, so that damage is found now."""
    if workspace.out.is_dir():
        protocol.read_results(workspace.out)
    earlier = []
    for path in config["compare"]:
        found = protocol.read_results(Path(path))
        if not found:
            raise ValueError(f"compare: {path} holds no results; give a run, or the results.jsonl of one")
        earlier += found
    return earlier


def _targets(export_to: str | None, samples: Sequence[EvaluationSamples]) -> Sequence[str | None]:
    """Where the samples of each size are exported to: the name carries the size if there are several."""
    if export_to is None:
        return [None] * len(samples)
    path, targets = Path(export_to), [export_to]
    if len(samples) > 1:
        targets = [str(path.with_name(f"{path.stem}-{size_text(each.size)}{path.suffix}")) for each in samples]
    for target, each in zip(targets, samples, strict=True):
        check_target(target, one_size=not isinstance(each.size, str))
    return targets


def _worker(file: Path) -> None:
    """One process of a group: `python -m genfound.evaluation.evaluator REQUEST_FILE`."""
    place = processes.rank_info()
    processes.tune_malloc()
    request = EvaluationRequest(**json.loads(file.read_text()))
    distributed.init_process_group("gloo", timeout=timedelta(days=1000))  # they wait for each other's whole work
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere if place.rank else sys.stdout):
        evaluate(request, place)


if __name__ == "__main__":
    with launch.reporting(), explain_oom("evaluate"):
        _worker(Path(sys.argv[1]))
