"""Evaluation: samples, their features, the figures, and the protocol without which no figure leaves.

Whatever takes long lies in files until it is used, and goes on there after an interruption.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from genfound import build, checkpoints, paths
from genfound.drawing import DATA, Drawn, make_requests
from genfound.extraction import DrawTask, Where, perform, shown
from genfound.loading import Loaded, load
from genfound.metrics import protocol
from genfound.metrics.export import check_target, export
from genfound.metrics.extractor import tensors_hash
from genfound.metrics.features import Features
from genfound.metrics.figures import check_convention, check_count, measure
from genfound.metrics.images import FolderImages, ImageSet, digest, image_files, note_of, open_images
from genfound.metrics.protocol import UNKNOWN, Drawing, Protocol, Result
from genfound.metrics.reference import common_size, file_hash
from genfound.references import GIVEN, DataSet, Place, Tool, prepare_extractor, prepare_reference
from genfound.reporting.provenance import provenance
from genfound.sampling import check_size, run_or_chosen
from genfound.tokenizers import Absent, Tokenizer

Config = Mapping[str, Any]
Size = tuple[int, int]
GROUPS = ("sampler", "guidance")


@dataclass(frozen=True)
class Asked:
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
class Samples:
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
    """

    images: ImageSet
    where: Where
    count: int
    size: Size | str
    drawing: Drawing
    subject: Mapping[str, Any]
    work: Path
    task: DrawTask | None


def evaluate(asked: Asked) -> list[Result]:
    """Evaluate at each size; prints and stores each result, and a table of several.

    Raises:
        FileNotFoundError, ValueError: wrong input, in one line.
    """
    config, source = asked.config, Path(asked.config["from"])
    place = place_of(config, source)
    earlier = [result for path in config["compare"] for result in protocol.read_results(Path(path))]
    loaded = None if is_images(source) else _load(config, source)
    data = None
    if loaded is not None:
        data = DataSet(loaded.config, loaded.tokenizer.spec, len(loaded.class_names))
    tool = prepare_extractor(config, data, place)
    sizes: Sequence[Size | str | None] = [None] if loaded is None else wanted_sizes(config, loaded)
    results = []
    for size in sizes:
        samples = given(config, source, place) if loaded is None else drawn(asked, loaded, size, data, place)
        target = _target(config, samples.size, len(sizes))
        results.append(result_of(asked, samples, data, tool, place, target))
        print("\n".join(results[-1].lines()), flush=True)
    if len(results) + len(earlier) > 1:
        print("\n".join(["", *protocol.table([*results, *earlier])]), flush=True)
    return results


def result_of(
    asked: Asked, samples: Samples, data: DataSet | None, tool: Tool, place: Place, target: str | None
) -> Result:
    """Reference, samples, features, figures; stored, and what took long removed unless it is to be kept."""
    config = asked.config
    check_convention(config["convention"])
    check_count("n", samples.count, tool.extractor)
    if target is not None:
        check_target(target, one_size=samples.size not in (DATA, "mixed"))
    reference, facts = prepare_reference(config, samples.size, data, tool, place)
    if samples.task is not None:
        _draw(samples, place)
    if target is not None:
        note = {"drawing": asdict(samples.drawing), "subject": dict(samples.subject), "size": samples.size}
        print(f"samples: {export(samples.images, target, note)}", flush=True)
    features = Features(samples.work / f"features-{tool.extractor.hash}", samples.count)
    tool.extract(features, samples.where, place)
    labels = None if samples.images.labels is None else samples.images.labels[: samples.count]
    figures = measure(features, reference, tool.extractor, config["convention"], labels, place.device)
    result = Result(
        figures=figures,
        protocol=protocol_of(asked, samples.count, samples.size, samples.drawing, tool, facts),
        subject=samples.subject,
        provenance=circumstances(place.device),
    )
    result.append_to(place.out)
    if not config["keep"]:
        remove(samples.work)
    return result


def protocol_of(
    asked: Asked, count: int, size: Size | str, drawing: Drawing, tool: Tool, reference: Mapping[str, Any]
) -> Protocol:
    """The protocol of a result; what was set otherwise than its name says is listed."""
    named = paths.compose("evaluate", [f"protocol={asked.protocol}"])
    keys = _option("protocol", "adm_50k") | _option("protocol", asked.protocol)
    told = {key: getattr(drawing, key) for key in ("labels", "seed", "weights", "uint8")}
    now = {**asked.config, "n": count, "reference_view": reference["view"], **told}
    now = {key: named[key] if value in (UNKNOWN, GIVEN) else value for key, value in now.items()}
    altered = [key for key in keys if named[key] is not None and now[key] != named[key]]
    if named["table"]:
        altered += [group for group in GROUPS if any(c.startswith((f"{group}=", f"{group}.")) for c in asked.chosen)]
    return Protocol(
        name=asked.protocol,
        altered=altered,
        count=count,
        size=size if isinstance(size, str) else list(size),
        drawing=drawing,
        extractor={"name": tool.extractor.name, "hash": tool.extractor.hash},
        convention=asked.config["convention"],
        reference=reference,
        versions=protocol.versions(),
    )


def place_of(config: Config, source: Path) -> Place:
    """Where this evaluation works: beside the images or the file, or in the run."""
    run = source.parent.parent if source.suffix == ".ckpt" else source
    beside = source.with_name(f"{source.name}.evaluations")
    out = Path(config["out"]) if config["out"] else run / "evaluations" if (run / "config.yaml").is_file() else beside
    device = build.device(config["accelerator"])
    devices = config["devices"] or (torch.cuda.device_count() if device.type == "cuda" else 1)
    return Place(out, Path(config["references"]), devices, config["accelerator"])


def is_images(path: Path) -> bool:
    """Whether a path is an npz file or a folder of images, not a model.

    Raises:
        FileNotFoundError: an empty folder.
    """
    if not path.is_dir():
        return path.suffix == ".npz"
    if (path / "config.yaml").is_file() or any(path.glob("*.safetensors")) or any(path.glob("*.bin")):
        return False
    if not any(path.iterdir()):
        raise FileNotFoundError(f"from={path} is an empty folder")
    return bool(image_files(path))


def wanted_sizes(config: Config, loaded: Loaded) -> list[Size | str]:
    """The sizes asked for, those of the protocol's table, or the most typical one of the data.

    Raises:
        ValueError: not a size, or one that does not divide into tokens.
    """
    asked = config["sizes"]
    if asked == DATA:
        return [DATA]
    if asked is None:
        asked = [row["size"] for row in config["table"] or ()] or list(loaded.sizes[0])
    sizes = pairs(asked)
    for size in sizes:
        check_size(size, loaded.tokenizer.spec.stride * loaded.config["model"]["patch_size"])
    return list(sizes)


def pairs(asked: Any) -> list[Size]:
    """[H, W] or [[H, W], ...] as pairs.

    Raises:
        ValueError: anything else.
    """
    rows = asked if isinstance(asked, list) and asked and isinstance(asked[0], list) else [asked]
    if not all(isinstance(row, list) and len(row) == 2 and all(type(side) is int for side in row) for row in rows):
        raise ValueError(f"sizes={asked} must be [height,width] or a list of such pairs, in pixels, or data")
    return [(row[0], row[1]) for row in rows]


def drawn(asked: Asked, loaded: Loaded, size: Size | str | None, data: DataSet | None, place: Place) -> Samples:
    """Samples that a model is to draw."""
    assert size is not None and data is not None
    config, source = asked.config, Path(asked.config["from"])
    how = settings(asked, loaded.config, size)
    build.objective(how)  # refuses a sampler that does not fit
    named = data.images("train") if DATA in (size, config["labels"]) else None
    requests = make_requests(config["n"], config["labels"], size, data.classes, config["seed"], named)
    drawing = drawing_of(config, how, loaded.tokenizer, place.device)
    subject = _subject(source, tensors_hash(loaded.net.state_dict()))
    facts = [asdict(drawing), subject["hash"], shown(size), config["batch"], how["objective"], how["layout"]]
    images = Drawn(place.out / "work" / digest(json.dumps([*facts, len(requests)])), requests)
    task = DrawTask(
        folder=str(images.folder),
        source=str(source),
        weights=config["weights"],
        hints=_hints(config),
        config=how,
        seed=config["seed"],
        batch=config["batch"],
        precision=config["precision"],
        accelerator=config["accelerator"],
    )
    where = Where("drawn", str(images.folder))
    return Samples(images, where, len(requests), size, drawing, subject, images.folder, task)


def given(config: Config, source: Path, place: Place) -> Samples:
    """Samples that are there: an npz file or a folder.

    Raises:
        ValueError: images of another size than asked for.
    """
    images = open_images(source)
    note = note_of(source) or {}
    size = common_size(images)
    if config["sizes"] not in (None, DATA):
        wanted = pairs(config["sizes"])
        if len(wanted) > 1 or size != wanted[0]:
            raise ValueError(f"from={source} holds images of {shown(size or 'mixed')} pixels, not {shown(wanted[0])}")
    hashed = _folder_hash(images) if isinstance(images, FolderImages) else file_hash(source)
    subject = {**note.get("subject", {"from": str(source), "hash": hashed}), "images": str(source)}
    drawing = Drawing(**note["drawing"]) if "drawing" in note else Drawing.unknown()
    count = min(config["n"], len(images))
    marked = DATA if note.get("size") == DATA else size or "mixed"
    where = Where("path", str(source))
    return Samples(images, where, count, marked, drawing, subject, place.out / "work" / images.key, None)


def settings(asked: Asked, run: Config, size: Size | str) -> dict[str, Any]:
    """The run's configuration with sampler, guidance and byte rule: the run's, the table's, or those chosen.

    Raises:
        ValueError: the protocol's table has no row for the size.
    """
    config, base = asked.config, dict(run)
    if config["table"]:
        rows = [row for row in config["table"] if row["size"] == list(size)]
        if not rows:
            raise ValueError(
                f"protocol={asked.protocol} has no row for {shown(size)}; add one to table, or choose another"
            )
        base |= {group: {**_option(group, rows[0][group]["name"]), **rows[0][group]} for group in GROUPS}
    found = {group: run_or_chosen(group, base, config, list(asked.chosen)) for group in GROUPS}
    return {**run, **found, "sample": {**run["sample"], "uint8": config["uint8"] or run["sample"]["uint8"]}}


def drawing_of(config: Config, how: Config, tokenizer: Tokenizer, device: torch.device) -> Drawing:
    """How samples of these settings are made, in the words of the protocol."""
    network = getattr(tokenizer, "model", None)
    decoder = {
        "name": type(tokenizer).__name__,
        "precision": how["tokenizer"].get("precision"),
        "hash": None if network is None else tensors_hash(network.state_dict()),
    }
    return Drawing(
        weights=config["weights"],
        sampler=dict(how["sampler"]),
        guidance=dict(how["guidance"]),
        labels=config["labels"],
        seed=config["seed"],
        precision=build.precision(config["precision"], device),
        decoder=decoder,
        uint8=how["sample"]["uint8"],
        versions=protocol.versions(),
    )


def remove(work: Path) -> None:
    """Remove what took long, and the folder of such work unless another evaluation is there."""
    shutil.rmtree(work)
    with contextlib.suppress(OSError):
        work.parent.rmdir()


def circumstances(device: torch.device) -> dict[str, Any]:
    """Code, machine and time of a result."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {**provenance(), "device": name, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}


def _option(group: str, name: str) -> dict[str, Any]:
    """What an option of conf/ says itself.

    Raises:
        ValueError: there is none.
    """
    file = Path(paths.config_dir()) / group / f"{name}.yaml"
    if not file.is_file():
        raise ValueError(f"{group}={name} is unknown")
    return {key: value for key, value in paths.read_yaml(file).items() if key != "defaults"}


def _load(config: Config, source: Path) -> Loaded:
    loaded = load(source, weights=config["weights"], **_hints(config))
    if isinstance(loaded.tokenizer, Absent):
        raise ValueError(loaded.tokenizer.reason)
    return loaded


def _hints(config: Config) -> dict[str, Any]:
    return {key: value for key, value in config["hints"].items() if value is not None}


def _draw(samples: Samples, place: Place) -> None:
    assert samples.task is not None and isinstance(samples.images, Drawn)
    samples.images.begin()
    missing = samples.images.missing
    if missing < samples.count:
        print(f"{samples.count - missing:,} of {samples.count:,} samples are there already", flush=True)
    try:
        if missing:
            perform(samples.task, place.devices, samples.work / "task.json")
    finally:
        if samples.images.missing == samples.count:
            remove(samples.work)


def _target(config: Config, size: Size | str, sizes: int) -> str | None:
    """Where the samples of a size are exported to: its name carries the size if there are several."""
    if config["export"] is None or sizes == 1:
        return config["export"]
    path = Path(config["export"])
    return str(path.with_name(f"{path.stem}-{shown(size)}{path.suffix}"))


def _subject(source: Path, weights: str) -> dict[str, Any]:
    run = source if source.is_dir() else source.parent.parent
    if not (run / "config.yaml").is_file():
        return {"from": str(source), "hash": weights}
    file = source if source.is_file() else checkpoints.newest(source / "checkpoints")
    assert file is not None
    seen = checkpoints.read(file)["images_seen"]
    return {"from": str(run), "checkpoint": file.name, "images_seen": seen, "hash": weights}


def _folder_hash(images: FolderImages) -> str:
    hashed = hashlib.sha256()
    for file in images.files:
        hashed.update(file.relative_to(images.folder).as_posix().encode())
        hashed.update(file.read_bytes())
    return hashed.hexdigest()[:16]
