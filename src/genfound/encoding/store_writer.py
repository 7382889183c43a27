"""The folder in which a latent store is made, by any number of processes that may be killed at any moment.

A folder is claimed by the manifest of the first command. Until it holds a shard, another command may claim it anew;
after that, only what makes the same shards may go on. Whoever finds all shards completes the manifest.
"""

import errno
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from genfound.config.compose import flatten
from genfound.data.latents import store
from genfound.data.latents.manifest import FORMAT, MANIFEST, fixed, read_manifest, store_digest, write_manifest
from genfound.data.latents.safetensors_io import read_header
from genfound.encoding.shard_plan import Shard
from genfound.runtime.files import lock, visible

SHARD = re.compile(r"(train|val)-\d{5,}\.safetensors")
PICTURE = re.compile(r"(train|val)-\d{5,}\.png")

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What freeing or allowing more space helps against."""


class StoreWriter:
    """The folder of a store in the making; `described` is the manifest before anything is encoded."""

    def __init__(self, out: Path, described: Mapping[str, Any]) -> None:
        self.out = out
        self.digest = store_digest(described)
        self.replaced: dict[str, str] = {}  # unreadable images -> those shown in their place, once all shards are there
        self.write(lambda: out.mkdir(parents=True, exist_ok=True), out)
        with lock(out / MANIFEST, wait=True):
            self.manifest = self._claimed(dict(described))  # the one that is there, or was put there now
        self.was_complete = self.manifest["shards"] is not None

    def _claimed(self, ours: dict[str, Any]) -> dict[str, Any]:
        """The manifest of the folder, which is this store's or is made so."""
        names = [file.name for file in visible(self.out)]
        theirs = self._read()
        if theirs is None:  # the shards know where they belong
            self._refuse_strangers(names)
        else:
            before, now = flatten(fixed(theirs)), flatten(fixed(ours))
            changed = [key for key in now | before if now.get(key) != before.get(key)]
            if changed and self.begun:
                pairs = (f"{key}: {_short(before.get(key))} there, {_short(now.get(key))} now" for key in changed[:3])
                what = f"was begun with other settings or images ({'; '.join(pairs)})"
                raise ValueError(f"out={self.out} {what}; choose another out=...")
            if store_digest(theirs) == self.digest:
                return theirs
            for name in filter(PICTURE.fullmatch, names):
                self.write((self.out / name).unlink, self.out / name)
        self.write(lambda: write_manifest(self.out, ours), self.out / MANIFEST)
        return ours

    def _read(self) -> dict[str, Any] | None:
        """The manifest that is there; `None` if it is damaged."""
        try:
            return read_manifest(self.out)
        except (FileNotFoundError, ValueError):
            return None

    def _refuse_strangers(self, names: list[str]) -> None:
        """Raise a ValueError about anything but shards of this store and what belongs to them."""
        manifest = self.out / MANIFEST
        begun = self.begun or (manifest.is_file() and FORMAT.rpartition(" ")[0].encode() in manifest.read_bytes())
        for name in names:
            file = self.out / name
            if SHARD.fullmatch(name):
                note = _note(file)
                if note is not None and note.get("store") != self.digest:
                    raise ValueError(f"{file} belongs to another store; choose another out=...")
            elif not (begun and (name == MANIFEST or PICTURE.fullmatch(name))):
                raise ValueError(f"out={self.out} holds {name} and is no latent store; choose another out=...")

    @property
    def begun(self) -> bool:
        """Whether a shard is there."""
        return any(SHARD.fullmatch(file.name) for file in self.out.iterdir())

    def file(self, shard: Shard) -> Path:
        """Where a shard lies."""
        return self.out / f"{shard.split}-{shard.number:05d}.safetensors"

    def write(self, write: Callable[[], object], file: Path) -> None:
        """Call `write`, which writes a file of the store; that it cannot, as on a full disk, is a ValueError."""
        try:
            write()
        except OSError as error:
            way = "make room" if error.errno in NO_ROOM else f"see that {self.out} can be written (or choose another)"
            reason = f"{file} cannot be written: {error.strerror or error}"
            raise ValueError(f"{reason}; complete shards are safe: {way} and give the same command again") from None

    def note(self, shard: Shard) -> dict[str, Any]:
        """What the metadata of a shard say of it."""
        return {"split": shard.split, "number": shard.number, "store": self.digest}

    def finished(self, shard: Shard) -> bool:
        """Whether a shard is there and intact, and its picture with it; what is damaged is reported and removed."""
        file = self.file(shard)
        if not file.exists():
            return False
        try:
            note = store.verify(file).note
        except ValueError as error:
            print(f"warning: {error}", flush=True)
            self.write(lambda: file.unlink(missing_ok=True), file)
            return False
        if not self._is_ours(note, shard):
            raise ValueError(f"{file} belongs to another store; choose another out=...")
        return file.with_suffix(".png").exists()

    def _is_ours(self, note: Mapping[str, Any], shard: Shard) -> bool:
        return self.note(shard).items() <= note.items()

    def complete(self, shards: list[Shard]) -> bool | None:
        """Write the manifest if all shards are there; whether this process has, or `None` if some are still missing."""
        try:
            indices = [store.read_index(self.file(shard)) for shard in shards]
        except (FileNotFoundError, ValueError):  # another process has still to write it, or to write it again
            return None
        if not all(self._is_ours(index.note, shard) for shard, index in zip(shards, indices, strict=True)):
            return None
        lines = [store.manifest_line(self.file(s), index) for s, index in zip(shards, indices, strict=True)]
        for split, expected in self.manifest["splits"].items():
            found = sum(line["entries"] for line in lines if line["file"].startswith(f"{split}-"))
            if found != expected["entries"]:
                raise ValueError(f"{self.out} holds {found:,} entries of {split}, not {expected['entries']:,}")
        train = [index.columns for index in indices if index.note["split"] == "train"]
        whole = {**self.manifest, "statistics": _statistics(train), "shards": lines}
        self.replaced = {name: other for index in indices for name, other in index.note["replaced"].items()}
        with lock(self.out / MANIFEST, wait=True):
            if self._read() == whole:
                return False
            self.write(lambda: write_manifest(self.out, whole), self.out / MANIFEST)
        return True


def _note(file: Path) -> dict[str, Any] | None:
    """The note of a shard, `None` where it is too damaged to have one."""
    try:
        return dict(json.loads(read_header(file).metadata["genfound"]))
    except (ValueError, KeyError, TypeError):
        return None


def _statistics(shards: Sequence[Mapping[str, np.ndarray]]) -> dict[str, list[float]]:
    """Mean and standard deviation of each channel of the unscaled means."""
    sums = sum((shard["sums"] for shard in shards), start=np.zeros_like(shards[0]["sums"]))
    count = sum(int(shard["sizes"].astype(np.int64).prod(axis=1).sum()) for shard in shards)
    mean, square = sums / count
    return {"mean": mean.tolist(), "std": np.sqrt(np.maximum(square - mean**2, 0)).tolist()}


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
