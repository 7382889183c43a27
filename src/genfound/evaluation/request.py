"""What an evaluation is asked for: conf/evaluate.yaml under a named protocol."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from genfound.config import checks, compose
from genfound.evaluation.protocol import UNKNOWN, SamplingRecord, Size, size_text
from genfound.metrics.compute import check_convention
from genfound.sampling.pipeline import run_or_chosen
from genfound.sampling.requests import check_size

DATA = "data"
"""As a size or a label rule: as the images of the data set have them."""

LABEL_RULES = ("random", "balanced", DATA)
GROUPS = ("sampler", "guidance")
COUNTS = ("n", "batch", "devices", "reference_images", "max_pixels")


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
        """The run's configuration; sampler, guidance, byte rule and precision are its own, the table's or those set."""
        config, base = self.config, dict(run)
        if config["table"]:
            rows = [row for row in config["table"] if row["size"] == list(size)]
            if not rows:
                raise ValueError(
                    f"protocol={self.protocol} has no row for {size_text(size)}; add one to table, or choose another"
                )
            base |= {group: rows[0][group] for group in GROUPS}
        return run_or_chosen(base, config, self.overrides)

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
