"""The protocol: what an evaluation is asked for, what a figure was measured under, and which protocols agree."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

from genfound.config import checks, compose
from genfound.metrics.compute import STORED, check_convention, depends_on_order
from genfound.runtime.files import makedirs
from genfound.sampling.pipeline import as_composed
from genfound.sampling.requests import DATA, LABEL_RULES, Size, check_size

UNKNOWN = "unknown"
"""Of images whose making is not recorded."""

RESULTS = "results.jsonl"
LIBRARIES = ("torch", "numpy", "pillow", "diffusers", "torchdiffeq", "genfound")
"""Those that can change a figure."""
NOT_COMPARED = ("name", "altered", "reference.from", "reference.rule", "reference.ignored", "drawing.guidance.weights")
"""What a protocol is called, where things lie, and by which rule they were found; hashes say what they are."""

GROUPS = ("sampler", "guidance")
COUNTS = ("n", "batch", "devices", "reference_images", "max_pixels")


@dataclass(frozen=True)
class SamplingRecord:
    """How samples were made; every field is needed, and is `unknown` for images that do not say."""

    weights: str
    sampler: Mapping[str, Any] | str  # name and all options
    guidance: Mapping[str, Any] | str  # likewise; of autoguidance also the hash of the weaker network
    rope: Mapping[str, Any] | str | None  # what was changed of the network's rotary positions
    batch: int | str | None  # images per network call, where the sampler's steps couple them
    labels: str
    seed: int | str
    precision: str
    decoder: Mapping[str, Any] | str  # the tokenizer's name, precision, and the hash of its weights
    uint8: str  # how decoded values became bytes
    versions: Mapping[str, str] | str  # of the libraries that drew

    @classmethod
    def from_note(cls, note: Any) -> Self:
        """What a stored note says, if it says all; otherwise unknown."""
        whole = isinstance(note, Mapping) and note.keys() == {field.name for field in fields(cls)}
        return cls(**note) if whole else cls.unknown()

    def summary(self) -> str:
        """Sampler, guidance and what was changed of rotary positions, in a line."""
        rope = "" if self.rope in (None, UNKNOWN) else f", rope {_text(self.rope)}"
        return f"sampler {_text(self.sampler)}, guidance {_text(self.guidance)}{rope}"

    @classmethod
    def unknown(cls) -> Self:
        """Of images from elsewhere."""
        return cls(**{field.name: UNKNOWN for field in fields(cls)})


@dataclass(frozen=True)
class EvaluationRequest:
    """The resolved conf/evaluate.yaml, the overrides of the command line, and the name of the protocol."""

    config: Mapping[str, Any]
    overrides: Sequence[str]
    protocol: str

    def check(self) -> None:
        """Raise a ValueError for what can be known to be wrong before anything is made."""
        config = self.config
        for key in COUNTS:
            checks.integer(key, config[key], 1, or_null=True)
        checks.integer("seed", config["seed"], 0)
        check_convention(config["convention"], config["extractor"])
        checks.one_of("labels", config["labels"], LABEL_RULES)
        for row in config["table"] or ():
            if not isinstance(row, Mapping) or "size" not in row:
                raise ValueError(f"table: {row} must have size, sampler and guidance")
            for group in GROUPS:
                if not isinstance(row.get(group), Mapping) or "name" not in row[group]:
                    raise ValueError(f"table: the row of {size_text(row['size'])} must have a {group} with its name")

    def sizes(self, typical: Size, unit: int) -> list[Size | str]:
        """The sizes asked for, those of the protocol's table, or the typical one of the data."""
        wanted = self.config["sizes"]
        if wanted == DATA:
            return [DATA]
        if wanted is None:
            wanted = [row["size"] for row in self.config["table"] or ()] or list(typical)
        sizes = checks.image_sizes("sizes", wanted)
        for size in sizes:
            check_size(size, unit)
        return list(sizes)

    def sampling_config(self, run: Mapping[str, Any], size: Size | str) -> dict[str, Any]:
        """The run's configuration with what was chosen; sampler and guidance that were not are the table's, if any."""
        config = dict(self.config)
        if config["table"]:
            row = next((row for row in config["table"] if row["size"] == list(size)), None)
            if row is None:
                text = size_text(size)
                raise ValueError(f"protocol={self.protocol} has no row for {text}; add one to table, or choose another")
            keys = [override.partition("=")[0] for override in self.overrides]
            for group in (group for group in GROUPS if group not in keys):
                single = (key.removeprefix(f"{group}.") for key in keys if key.startswith(f"{group}."))
                set_now = {key: config[group][key] for key in single}
                config[group] = compose.fill_option(group, {**row[group], **set_now})
        return as_composed(run, config)

    def changed_keys(self, record: SamplingRecord, used: Mapping[str, Any]) -> list[str]:
        """The keys of the named protocol that were set otherwise, then the options of sampler, guidance and positions.

        They are those of `config`, but for what the record of the samples says, and for those in `used`.
        """
        named = compose.compose("evaluate", [f"protocol={self.protocol}"])
        keys = compose.read_option("protocol", "adm_50k") | compose.read_option("protocol", self.protocol)
        made = {key: getattr(record, key) for key in ("labels", "seed", "weights")}
        if named["uint8"] is not None:
            made["uint8"] = record.uint8
        now = {**self.config, **made, **used}
        changed = [key for key in keys if now[key] not in (named[key], UNKNOWN)]
        names = dict.fromkeys(override.partition("=")[0] for override in self.overrides)
        return [*changed, *(name for name in names if name.partition(".")[0] in (*GROUPS, "rope"))]


@dataclass(frozen=True)
class Protocol:
    """All that two figures must share to be compared; what differs besides the trained weights."""

    name: str
    altered: Sequence[str]  # keys that were set otherwise than the protocol of this name says
    count: int
    size: Sequence[int] | str  # [height, width], `data` for those of the data set, or `mixed`
    drawing: SamplingRecord
    extractor: Mapping[str, str]  # name and hash
    convention: str  # one of `metrics.compute.CONVENTIONS`, or `probe`
    reference: Mapping[str, Any]  # hash, rule, view, and what is known of its images
    versions: Mapping[str, str]  # of the libraries that measured
    order: str = STORED  # of the samples; see `metrics.compute.depends_on_order`

    def facts(self) -> dict[str, Any]:
        """{dotted key: value} of what is compared; see `NOT_COMPARED`."""
        flat = compose.flatten(json.loads(json.dumps(asdict(self))))
        unused = () if depends_on_order(self.convention, self.count) else ("order",)
        return {key: value for key, value in flat.items() if key not in (*NOT_COMPARED, *unused)}

    def lines(self) -> list[str]:
        """For the user."""
        d = self.drawing
        rope = "" if d.rope in (None, UNKNOWN) else f", rope {_text(d.rope)}"
        batch = "" if d.batch in (None, UNKNOWN) else f", {d.batch} images together"
        others = "" if d.versions in (self.versions, UNKNOWN) else f", drawn with {_text(d.versions)}"
        title = self.name + (f", but for {', '.join(self.altered)}" if self.altered else "")
        return [
            f"protocol {title}",
            f"  {self.count:,} samples of {size_text(self.size)}, labels {d.labels}, seed {d.seed}, order {self.order}",
            f"  weights {d.weights}, in {d.precision}{rope}",
            f"  sampler {_text(d.sampler)}{batch}",
            f"  guidance {_text(d.guidance)}",
            f"  decoder {_text(d.decoder)}, uint8 {d.uint8}",
            f"  extractor {_text(self.extractor)}, convention {self.convention}",
            f"  reference {_text(self.reference)}",
            f"  versions {_text(self.versions)}{others}",
        ]


@dataclass(frozen=True)
class Result:
    """Figures, and what they are worth; figures leave this package in no other form."""

    figures: Mapping[str, float]
    protocol: Protocol
    subject: Mapping[str, Any]  # whose figures they are: `from`, and the hash of the weights or images
    provenance: Mapping[str, Any]  # code, machine and time

    def __post_init__(self) -> None:
        wrong = [name for name, value in self.figures.items() if not isinstance(value, float)]
        if wrong or not self.figures:
            raise TypeError(f"a result needs figures, each a number: {wrong}")

    @classmethod
    def from_stored(cls, line: Mapping[str, Any]) -> Self:
        """Of a line of results.jsonl."""
        drawing = SamplingRecord(**line["protocol"]["drawing"])
        return cls(**{**line, "protocol": Protocol(**{**line["protocol"], "drawing": drawing})})

    def lines(self) -> list[str]:
        """For the user: the figures, whose they are, and the protocol."""
        figures = "   ".join(f"{name} {value:.6g}" for name, value in self.figures.items())
        return [figures, f"  of {_text(self.subject)}", *self.protocol.lines()]

    def append_to(self, folder: Path) -> None:
        """Add a line to the results of a folder, unless the same figures under the same protocol are there."""
        makedirs(folder)
        if not any(replace(old, provenance=self.provenance) == self for old in read_results(folder)):
            with open(folder / RESULTS, "a") as out:
                out.write(json.dumps(asdict(self)) + "\n")


def read_results(path: Path) -> list[Result]:
    """Results of a file, of a folder, or of a run; none where there are none."""
    if not path.exists():
        raise FileNotFoundError(f"there are no results {path}")
    places = [path] if path.is_file() else [path / RESULTS, path / "evaluations" / RESULTS]
    lines = (line for place in places if place.is_file() for line in place.read_text().splitlines())
    try:
        return [Result.from_stored(json.loads(line)) for line in lines]
    except (ValueError, KeyError, TypeError) as error:
        text = f"{path} holds a line that is not a result; remove it, or move the file away: {error}"
        raise ValueError(text) from None


def differences(a: Protocol, b: Protocol) -> list[str]:
    """The fields in which two protocols differ, each by its dotted key; none: the figures may be compared.

    How images from elsewhere were drawn is unknown, and agrees with nothing.
    """
    ours, theirs = a.facts(), b.facts()
    keys = {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}
    if SamplingRecord.unknown() in (a.drawing, b.drawing):
        keys = {key for key in keys if not key.startswith("drawing.")} | {"drawing (unknown)"}
    return sorted(keys)


def table(results: Sequence[Result]) -> list[str]:
    """One row per result; the last column says what keeps it from being compared with the first."""
    names = list(dict.fromkeys(name for result in results for name in result.figures))
    rows = [["", *names, "protocol"]]
    for place, result in enumerate(results):
        values = [f"{result.figures[name]:.6g}" if name in result.figures else "-" for name in names]
        differing = differences(results[0].protocol, result.protocol)
        verdict = f"differs: {', '.join(differing)}" if differing else result.protocol.name if not place else "the same"
        subject = [result.subject["from"], result.subject.get("checkpoint"), result.subject["hash"][:8]]
        rows.append([" ".join(str(part) for part in subject if part), *values, verdict])
    widths = [max(len(row[i]) for row in rows) for i in range(len(names) + 1)]
    return ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[-1]]) for row in rows]


def size_text(size: Any) -> str:
    """[256, 128] -> 256x128; a text as it is."""
    return size if isinstance(size, str) else "x".join(map(str, size))


def _text(value: Any) -> str:
    if not isinstance(value, Mapping):
        return str(value)
    first = [str(value[key]) for key in ("from", "name") if key in value]
    rest = {key: inner for key, inner in value.items() if key not in ("from", "name") and inner is not None}
    return ", ".join([*first, *(f"{key} {_text(inner)}" for key, inner in rest.items())])
