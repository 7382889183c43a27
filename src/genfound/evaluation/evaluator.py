"""Evaluation: samples, their features, the figures, and the protocol without which no figure leaves.

Whatever takes long lies in files until it is used, and goes on there after an interruption.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genfound import build
from genfound.checkpoints.convert import save
from genfound.checkpoints.load import LoadedModel, hints_of, load
from genfound.config import checks, compose
from genfound.data.images.npz import file_hash
from genfound.data.images.sets import FolderImages, ImageSet, Subset, digest, ignored_files, open_images
from genfound.evaluation import protocol
from genfound.evaluation.export import check_target, export
from genfound.evaluation.extraction import NETWORK, DrawTask, Where, guide_hash, network_hash, perform, size_text
from genfound.evaluation.protocol import UNKNOWN, Protocol, Result, SamplingRecord
from genfound.evaluation.provenance import (
    checkpoint_of,
    is_images,
    model_identity,
    pin_guide_checkpoint,
    read_provenance,
    sampling_record,
)
from genfound.evaluation.references import (
    DECODED,
    GIVEN,
    RunDataset,
    Tool,
    Workspace,
    content,
    prepare_extractor,
    prepare_reference,
    write_order,
)
from genfound.evaluation.samples import DATA, SampleStore, check_labels, requests_by_rule
from genfound.loggers.provenance import provenance
from genfound.metrics.compute import (
    CONTENT,
    STORED,
    check_convention,
    check_count,
    check_reference,
    compute,
    convention_of,
)
from genfound.metrics.features import FeatureStore
from genfound.metrics.reference_stats import common_size
from genfound.runtime import devices
from genfound.runtime.files import check_folder, lock, remove
from genfound.sampling.pipeline import Pipeline, run_or_chosen
from genfound.sampling.requests import check_size
from genfound.tokenizers import Undecodable

Config = Mapping[str, Any]
Size = tuple[int, int]
GROUPS = ("sampler", "guidance")
COUNTS = ("n", "batch", "devices", "reference_images", "max_pixels")


@dataclass(frozen=True)
class EvaluationRequest:
    """What the command line asks for.

    Attributes:
        config: conf/evaluate.yaml, resolved.
        chosen: the overrides.
        protocol: its name.
    """

    config: Config
    chosen: Sequence[str]
    protocol: str


@dataclass(frozen=True)
class EvaluationSamples:
    """What is measured.

    Attributes:
        images: the set; of those that are to be drawn, where they will be.
        where: how any process can open them.
        count: how many of them.
        size: (height, width), `data`, or `mixed`.
        drawing: how they were made.
        subject: whose they are.
        work: folder for what takes long.
        task: draws them; `None` if they are there.
        network: what draws them.
        order: of the files of a folder, by content.
    """

    images: ImageSet
    where: Where
    count: int
    size: Size | str
    drawing: SamplingRecord
    subject: Mapping[str, Any]
    work: Path
    task: DrawTask | None = None
    network: LoadedModel | None = None
    order: np.ndarray | None = None


def evaluate(asked: EvaluationRequest) -> list[Result]:
    """Evaluate at each size; prints and stores each result, and a table of several.

    Raises:
        FileNotFoundError, ValueError: wrong input, in one line.
    """
    config, source = asked.config, Path(asked.config["from"])
    check(config)
    place = workspace(config, source)
    check_folder("out", place.out)
    check_folder("references", place.references)
    earlier = _earlier(config, place)
    loaded = data = None
    if is_images(source):
        if _moved(config):
            raise ValueError(f"data.{next(iter(_moved(config)))}: images alone have no data set; from=RUN has one")
        asked = replace(asked, chosen=[])  # their sampler and guidance are what they were
    else:
        source = checkpoint_of(source)
        loaded = _load(config, source)
        data = RunDataset(loaded.config, loaded.tokenizer.spec, len(loaded.class_names))
    sizes: Sequence[Size | str | None] = [None] if loaded is None else wanted_sizes(config, loaded)
    targets = [_target(config, size, len(sizes)) for size in sizes]
    for target, size in zip(targets, sizes, strict=True):
        if target is not None:
            check_target(target, one_size=size != DATA)
    ours = [new_samples(asked, source, loaded, size, data, place) for size in sizes] if loaded is not None else []
    if len(sizes) > 1:
        print(f"{len(sizes)} sizes, {config['n']:,} samples of each; sizes=... chooses", flush=True)
    tool = prepare_extractor(config, data, place)
    results = []
    for samples, target in zip(ours or [existing_samples(config, source, place)], targets, strict=True):
        results.append(evaluate_size(asked, samples, data, tool, place, target))
        print("\n".join(results[-1].lines()), flush=True)
    if len(results) + len(earlier) > 1:
        print("\n".join(["", *protocol.table([*results, *earlier])]), flush=True)
    return results


def evaluate_size(
    asked: EvaluationRequest,
    samples: EvaluationSamples,
    data: RunDataset | None,
    tool: Tool,
    place: Workspace,
    target: str | None,
) -> Result:
    """Reference, samples, features, figures; stored, and what took long removed unless it is to be kept."""
    config = asked.config
    check_count("n", samples.count, tool.extractor)
    if target is not None:
        check_target(target, one_size=samples.size not in (DATA, "mixed"))
    reference, facts = prepare_reference(config, samples.size, data, tool, place)
    check_reference(reference, tool.extractor, config["convention"])
    with lock(samples.work):
        if samples.task is not None:
            _draw(samples, place)
        if target is not None:
            note = {"drawing": asdict(samples.drawing), "subject": dict(samples.subject), "size": samples.size}
            print(f"samples: {export(samples.images, target, note)}", flush=True)
        if samples.order is not None:
            write_order(Path(str(samples.where.order)), samples.order)
        features = FeatureStore(samples.work / f"features-{tool.extractor.hash}-{samples.count}", samples.count)
        tool.extract(features, samples.where, place)
        labels = samples.images.labels
        figures = compute(features, reference, tool.extractor, config["convention"], labels, place.device)
        result = Result(
            figures=figures,
            protocol=make_protocol(asked, samples.count, samples.size, samples.drawing, tool, facts, samples.order),
            subject=samples.subject,
            provenance=circumstances(place.device),
        )
        result.append_to(place.out)
        if not config["keep"]:
            remove(samples.work)
    return result


def make_protocol(
    asked: EvaluationRequest,
    count: int,
    size: Size | str,
    drawing: SamplingRecord,
    tool: Tool,
    reference: Mapping[str, Any],
    order: np.ndarray | None = None,
) -> Protocol:
    """The protocol of a result; what was set otherwise than its name says is listed.

    `order` is that of files by content; `None`: as stored.
    """
    return Protocol(
        name=asked.protocol,
        altered=_changed_keys(asked, count, drawing, str(reference["view"])),
        count=count,
        size=size if isinstance(size, str) else list(size),
        drawing=drawing,
        extractor={"name": tool.extractor.name, "hash": tool.extractor.hash},
        convention=convention_of(asked.config["convention"], tool.extractor.name),
        reference=reference,
        versions=protocol.versions(),
        order=STORED if order is None else CONTENT,
    )


def _changed_keys(asked: EvaluationRequest, count: int, drawing: SamplingRecord, view: str) -> list[str]:
    """The keys of a named protocol that were set otherwise, then the options of sampler, guidance and positions."""
    named = compose.compose("evaluate", [f"protocol={asked.protocol}"])
    keys = compose.read_option("protocol", "adm_50k") | compose.read_option("protocol", asked.protocol)
    told = {key: getattr(drawing, key) for key in ("labels", "seed", "weights")}
    if named["uint8"] is not None:
        told["uint8"] = drawing.uint8
    now = {**asked.config, **told, "n": count, "reference_view": view.removesuffix(DECODED)}
    unused = ("reference_view", "reference_images") if view == GIVEN else ()
    altered = [key for key in keys if key not in unused and now[key] not in (named[key], UNKNOWN)]
    chosen = (override.partition("=")[0] for override in asked.chosen)
    return [*altered, *dict.fromkeys(key for key in chosen if key.partition(".")[0] in (*GROUPS, "rope"))]


def workspace(config: Config, source: Path) -> Workspace:
    """Where this evaluation works: beside the images or the file, or in the run."""
    run = source.parent.parent if source.suffix == ".ckpt" else source
    named = source if source.name not in ("", "..") else source.resolve()
    beside = named.parent / f"{named.name}.evaluations"
    out = Path(config["out"]) if config["out"] else run / "evaluations" if (run / "config.yaml").is_file() else beside
    device = devices.device(config["accelerator"])
    count = config["devices"] or (torch.cuda.device_count() if device.type == "cuda" else 1)
    return Workspace(out, Path(config["references"]), count, config["accelerator"])


def check(config: Config) -> None:
    """Raise a ValueError for what can be known to be wrong before anything is made."""
    for key in COUNTS:
        checks.integer(key, config[key], 1, or_null=True)
    check_convention(config["convention"], config["extractor"])
    check_labels(config["labels"])
    for row in config["table"] or ():
        if not isinstance(row, Mapping) or "size" not in row:
            raise ValueError(f"table: {row} must have size, sampler and guidance")
        for group in GROUPS:
            if not isinstance(row.get(group), Mapping) or "name" not in row[group]:
                raise ValueError(f"table: the row of {size_text(row['size'])} must have a {group} with its name")


def wanted_sizes(config: Config, loaded: LoadedModel) -> list[Size | str]:
    """The sizes asked for, those of the protocol's table, or the most typical one of the data.

    Raises:
        ValueError: not a size, or one that does not divide into tokens.
    """
    asked = config["sizes"]
    if asked == DATA:
        return [DATA]
    if asked is None:
        asked = [row["size"] for row in config["table"] or ()] or list(loaded.sizes[0])
    sizes = checks.image_sizes("sizes", asked)
    for size in sizes:
        check_size(size, loaded.tokenizer.spec.stride * loaded.config["model"]["patch_size"])
    return list(sizes)


def new_samples(
    asked: EvaluationRequest,
    source: Path,
    loaded: LoadedModel,
    size: Size | str | None,
    data: RunDataset | None,
    place: Workspace,
) -> EvaluationSamples:
    """Samples that a model is to draw."""
    assert size is not None and data is not None
    config = asked.config
    how = pin_guide_checkpoint(sampling_config(asked, loaded.config, size))
    objective = build.objective(how)  # refuses a sampler that does not fit
    sampling = Pipeline.of(how, objective, loaded.tokenizer, torch.device("cpu"), config["batch"])
    sampling.check(loaded.net)
    named = data.images("train") if DATA in (size, config["labels"]) else None
    requests = requests_by_rule(config["n"], config["labels"], size, data.classes, config["seed"], named)
    weak = guide_hash(sampling)
    drawing = sampling_record(config, how, loaded.tokenizer, place.device, weak)
    subject = model_identity(source, network_hash(loaded.net, loaded.config))
    facts = [asdict(drawing), subject["hash"], size_text(size), config["batch"], how["objective"], how["layout"]]
    images = SampleStore(place.out / "work" / digest(json.dumps([*facts, len(requests)])), requests)
    task = DrawTask(
        folder=str(images.folder),
        weak=weak,
        rope=config["rope"],
        config=how,
        seed=config["seed"],
        batch=config["batch"],
        accelerator=config["accelerator"],
    )
    where = Where("drawn", str(images.folder))
    return EvaluationSamples(images, where, len(requests), size, drawing, subject, images.folder, task, loaded)


def existing_samples(config: Config, source: Path, place: Workspace) -> EvaluationSamples:
    """Samples that are there: an npz file or a folder.

    Raises:
        ValueError: images of another size than asked for.
    """
    images = open_images(source, config["max_pixels"])
    size = common_size(images)
    if config["sizes"] not in (None, DATA):
        wanted = checks.image_sizes("sizes", config["sizes"])
        if wanted != [size]:
            asked = " and ".join(map(size_text, wanted))
            raise ValueError(f"from={source} holds images of {size_text(size or 'mixed')} pixels, not {asked}")
    count, order = min(config["n"], len(images)), None
    if isinstance(images, FolderImages):
        hashed, order = content(images)
    else:
        hashed = file_hash(source)
    subject, drawing, noted = read_provenance(source, hashed)
    subject |= ignored_files(images)
    marked = DATA if noted == DATA else size or "mixed"
    chosen = Subset(images, np.arange(count) if order is None else order[:count])
    work = place.out / "work" / f"{chosen.key}-{count}"
    path = None if order is None else str(work / "order.npy")
    where = Where("path", str(source), order=path, max_pixels=config["max_pixels"])
    return EvaluationSamples(chosen, where, count, marked, drawing, subject, work, order=order)


def sampling_config(asked: EvaluationRequest, run: Config, size: Size | str) -> dict[str, Any]:
    """The run's configuration with sampler, guidance, byte rule and precision: its own, the table's, or those chosen.

    Raises:
        ValueError: the protocol's table has no row for the size.
    """
    config, base = asked.config, dict(run)
    if config["table"]:
        rows = [row for row in config["table"] if row["size"] == list(size)]
        if not rows:
            raise ValueError(
                f"protocol={asked.protocol} has no row for {size_text(size)}; add one to table, or choose another"
            )
        base |= {group: {**compose.read_option(group, rows[0][group]["name"]), **rows[0][group]} for group in GROUPS}
    found = {group: run_or_chosen(group, base, config, list(asked.chosen)) for group in GROUPS}
    return {
        **run,
        **found,
        "sample": {**run["sample"], "uint8": config["uint8"] or run["sample"]["uint8"]},
        "trainer": {**run["trainer"], "precision": config["precision"] or run["trainer"]["precision"]},
    }


def circumstances(device: torch.device) -> dict[str, Any]:
    """Code, machine and time of a result."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {**provenance(), "device": name, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}


def _load(config: Config, source: Path) -> LoadedModel:
    loaded = load(source, weights=config["weights"], trust=config["trust"], **hints_of(config))
    if isinstance(loaded.tokenizer, Undecodable):
        raise ValueError(loaded.tokenizer.reason)
    loaded.net.reposition(config["rope"])
    moved = _moved(config)
    foreign = sorted(moved.keys() - loaded.config["data"].keys())
    if foreign:
        raise ValueError(f"data.{foreign[0]} is not an option of the data of {config['from']}")
    return replace(loaded, config={**loaded.config, "data": {**loaded.config["data"], **moved}})


def _moved(config: Config) -> dict[str, str]:
    """Where the data of the run are now, as far as that is set."""
    return {key: str(value) for key, value in config["data"].items() if value is not None}


def _earlier(config: Config, place: Workspace) -> list[Result]:
    """The results to compare with; those that the new ones join are read too, so that damage is found now."""
    if place.out.is_dir():
        protocol.read_results(place.out)
    found = [(path, protocol.read_results(Path(path))) for path in config["compare"]]
    empty = [path for path, results in found if not results]
    if empty:
        raise ValueError(f"compare: {empty[0]} holds no results; give a run, or the results.jsonl of one")
    return [result for _, results in found for result in results]


def _draw(samples: EvaluationSamples, place: Workspace) -> None:
    assert samples.task is not None and samples.network is not None and isinstance(samples.images, SampleStore)
    samples.images.begin()
    missing = samples.images.missing
    if missing < samples.count:
        print(f"{samples.count - missing:,} of {samples.count:,} samples are there already", flush=True)
    try:
        if missing:
            print(f"drawing {size_text(samples.size)}, {samples.drawing.how()}", flush=True)
            save(samples.network, samples.work / NETWORK)
            perform(samples.task, place.devices, samples.work / "task.json")
    finally:
        (samples.work / NETWORK).unlink(missing_ok=True)
        if samples.images.missing == samples.count:
            remove(samples.work)


def _target(config: Config, size: Size | str | None, sizes: int) -> str | None:
    """Where the samples of a size are exported to: its name carries the size if there are several."""
    if config["export"] is None or sizes == 1:
        return config["export"]
    path = Path(config["export"])
    return str(path.with_name(f"{path.stem}-{size_text(size)}{path.suffix}"))
