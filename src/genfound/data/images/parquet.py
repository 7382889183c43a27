"""Images in parquet files, as the datasets library of Hugging Face and its hub keep ImageNet."""

import functools
import importlib
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from genfound.data.images.archives import Archives, Member
from genfound.data.images.names import unique

IMAGE, LABEL = "image", "label"
"""Columns: {bytes, path} or bytes, and the number of a class."""

GROUPS = 4
"""Groups of rows that a process keeps in memory."""


class ImageParquet(Archives):
    """`*.parquet` with the columns `image` and `label`, whose classes are named by the metadata of the data set.

    Rows are read in groups (of 100 in ImageNet's files), the last few of which stay in memory: in their order, as when
    they are encoded, that costs nothing, and in a random one a group for each image.
    """

    suffix = ".parquet"

    def scan(self, file: Path) -> Iterator[Member]:
        """The images of a file."""
        table, row = _opened(file), 0
        columns = table.schema_arrow.names
        if missing := {IMAGE, LABEL} - {*columns}:
            raise ValueError(f"{file} has no column {min(missing)}; its columns: {', '.join(columns)}")
        for group in range(table.num_row_groups):
            images, labels = (_column(str(file), group, name) for name in (IMAGE, LABEL))
            for image, label in zip(images, labels, strict=True):
                name, data = f"row {row}", _bytes(image.as_py())
                found = self.header(name, io.BytesIO(data)) if data else "it is empty"
                if (number := label.as_py()) is None:
                    raise ValueError(f"{file} has no label in {name}; give every image the number of its class")
                yield Member(name, number, row, len(data), found)
                row += 1

    def content(self, file: Path, place: int, size: int) -> bytes:
        """The bytes of an image."""
        group, first = 0, 0
        ends = _ends(str(file))
        while ends[group] <= place:
            first, group = ends[group], group + 1
        return _bytes(_column(str(file), group, IMAGE)[place - first].as_py())

    def names_of(self, labels: Sequence[int | str], file: Path) -> list[str]:
        """Names of classes by the metadata of the `datasets` library, else numbers."""
        note = (_opened(file).schema_arrow.metadata or {}).get(b"huggingface", b"{}")
        try:
            names = json.loads(note)["info"]["features"][LABEL]["names"]
        except (ValueError, KeyError, TypeError):
            return super().names_of(labels, file)
        return unique([str(name) for name in names])


def _opened(file: Path) -> Any:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise ValueError("data=image_parquet needs pyarrow: pip install 'genfound[parquet]'") from None
    try:
        return parquet.ParquetFile(file)
    except (OSError, ValueError) as error:  # pyarrow's own errors are both
        raise ValueError(f"{file} is no parquet file, or is damaged: {str(error).splitlines()[0]}") from None


@functools.lru_cache(maxsize=GROUPS)
def _column(file: str, group: int, name: str) -> Any:
    try:
        return _opened(Path(file)).read_row_group(group, columns=[name], use_threads=False).column(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is damaged in its group {group} of rows: {str(error).splitlines()[0]}") from None


@functools.cache
def _ends(file: str) -> list[int]:
    """Where each group of rows ends."""
    facts, ends = _opened(Path(file)).metadata, [0]
    for group in range(facts.num_row_groups):
        ends.append(ends[-1] + facts.row_group(group).num_rows)
    return ends[1:]


def _bytes(image: Any) -> bytes:
    """The file in a value of the image column; none where it holds only a path."""
    data = image.get("bytes") if isinstance(image, dict) else image
    return data if isinstance(data, bytes) else b""
