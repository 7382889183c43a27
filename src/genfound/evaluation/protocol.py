"""What a figure is worth: the protocol that it was measured under, and which protocols agree."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from genfound.config.compose import flatten
from genfound.metrics.compute import STORED, depends_on_order
from genfound.runtime.files import makedirs

Size = tuple[int, int]
UNKNOWN = "unknown"
"""Of images whose making is not recorded."""

RESULTS = "results.jsonl"
LIBRARIES = ("torch", "numpy", "pillow", "diffusers", "torchdiffeq", "genfound")
"""Those that can change a figure."""
NOT_COMPARED = ("name", "altered", "reference.from", "reference.rule", "reference.ignored", "drawing.guidance.weights")
"""What a protocol is called, where things lie, and by which rule they were found; hashes say what they are."""


@dataclass(frozen=True)
class SamplingRecord:
    """How samples were made; every field is needed, and is `unknown` for images that do not say.

    Attributes:
        sampler, guidance: name and all options; of autoguidance also the hash of the weaker network.
        rope: what was changed of the network's rotary positions; `None` if nothing was.
        batch: images per network call, where the sampler's steps couple them; `None` where they do not.
        decoder: the tokenizer's name, precision, and the hash of its weights.
        uint8: how decoded values became bytes.
        versions: of the libraries that drew.
    """

    weights: str
    sampler: Mapping[str, Any] | str
    guidance: Mapping[str, Any] | str
    rope: Mapping[str, Any] | str | None
    batch: int | str | None
    labels: str
    seed: int | str
    precision: str
    decoder: Mapping[str, Any] | str
    uint8: str
    versions: Mapping[str, str] | str

    @classmethod
    def from_note(cls, note: Any) -> SamplingRecord:
        """What a stored note says, if it says all; otherwise unknown."""
        whole = isinstance(note, Mapping) and note.keys() == {field.name for field in fields(cls)}
        return cls(**note) if whole else cls.unknown()

    def summary(self) -> str:
        """Sampler and guidance, in a line."""
        return f"sampler {_text(self.sampler)}, guidance {_text(self.guidance)}"

    @classmethod
    def unknown(cls) -> SamplingRecord:
        """Of images from elsewhere."""
        return cls(**{field.name: UNKNOWN for field in fields(cls)})


@dataclass(frozen=True)
class Protocol:
    """All that two figures must share to be compared; what differs besides the trained weights.

    Attributes:
        name: a named protocol; `altered` are its keys that were set otherwise.
        count, order: of the samples; see `metrics.compute.depends_on_order`.
        size: [height, width], `data` for those of the data set, or `mixed`.
        drawing: how they were made.
        extractor: name and hash.
        convention: see `metrics.compute.CONVENTIONS`; `probe` of a probe.
        reference: hash, rule, view, and what is known of its images.
        versions: of the libraries that measured.
    """

    name: str
    altered: Sequence[str]
    count: int
    size: Sequence[int] | str
    drawing: SamplingRecord
    extractor: Mapping[str, str]
    convention: str
    reference: Mapping[str, Any]
    versions: Mapping[str, str]
    order: str = STORED

    def facts(self) -> dict[str, Any]:
        """{dotted key: value} of what is compared; see `NOT_COMPARED`."""
        flat = flatten(json.loads(json.dumps(asdict(self))))
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
    """Figures, and what they are worth; figures leave this package in no other form.

    Attributes:
        subject: whose figures they are: `from`, and the hash of the weights or images.
        provenance: code, machine and time.
    """

    figures: Mapping[str, float]
    protocol: Protocol
    subject: Mapping[str, Any]
    provenance: Mapping[str, Any]

    def __post_init__(self) -> None:
        wrong = [name for name, value in self.figures.items() if not isinstance(value, float)]
        if wrong or not self.figures:
            raise TypeError(f"a result needs figures, each a number: {wrong}")

    @classmethod
    def from_stored(cls, line: Mapping[str, Any]) -> Result:
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
        if any(replace(old, provenance=self.provenance) == self for old in read_results(folder)):
            return
        with open(folder / RESULTS, "a") as out:
            out.write(json.dumps(asdict(self)) + "\n")


def read_results(path: Path) -> list[Result]:
    """Results of a file, of a folder, or of a run; none where there are none.

    Raises:
        FileNotFoundError: there is no such path.
        ValueError: a damaged line.
    """
    if not path.exists():
        raise FileNotFoundError(f"there are no results {path}")
    places = [path] if path.is_file() else [path / RESULTS, path / "evaluations" / RESULTS]
    lines = (line for place in places if place.is_file() for line in place.read_text().splitlines())
    try:
        return [Result.from_stored(json.loads(line)) for line in lines]
    except (ValueError, KeyError, TypeError) as error:
        way = "remove it, or move the file away"
        raise ValueError(f"{path} holds a line that is not a result; {way}: {error}") from None


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
    """A mapping in words."""
    if not isinstance(value, Mapping):
        return str(value)
    first = [str(value[key]) for key in ("from", "name") if key in value]
    rest = {key: inner for key, inner in value.items() if key not in ("from", "name") and inner is not None}
    return ", ".join([*first, *(f"{key} {_text(inner)}" for key, inner in rest.items())])
