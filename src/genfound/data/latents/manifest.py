"""The manifest of a latent store: what was encoded and how, and the checksum of each shard.

`manifest.json` is JSON in one fixed layout. Its last line is the crc32 of everything else, so that no byte of it can
change unnoticed.
"""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from genfound.runtime.files import atomic_write, digest

MANIFEST = "manifest.json"
FORMAT = "genfound latents 2"
REPAIR = "the command that encoded the store makes this shard anew"

RESULTS = ("statistics", "shards")
"""What is known only when all shards are there."""

FREE = (("source", "root"), ("tokenizer", "weights"))
"""What may differ when encoding goes on: fingerprints say whether images and weights are the same."""


def read_manifest(root: Path) -> dict[str, Any]:
    """The manifest of a store."""
    file = root / MANIFEST
    if not file.is_file():
        raise FileNotFoundError(f"data.root={root} is no latent store: it has no {MANIFEST}")
    try:
        text = file.read_text()
        manifest = dict(json.loads(text))
        version = manifest["format"]
        crc = manifest.pop("crc32", None)
        intact = version != FORMAT if crc is None else text == _text(manifest)  # the first format had none
    except (ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise ValueError(f"{file} is damaged; {REPAIR.replace('shard', 'file')}")
    if version != FORMAT:
        raise ValueError(f"{file} is of format {version}, not {FORMAT}; encode the store again")
    return manifest


def write_manifest(root: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest of a store, whole or not at all; the same one is the same bytes."""
    atomic_write(root / MANIFEST, lambda temporary: temporary.write_text(_text(manifest)))


def _text(manifest: Mapping[str, Any]) -> str:
    return json.dumps({**manifest, "crc32": zlib.crc32(json.dumps(manifest).encode())}, indent=1)


def fixed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a manifest that says what its shards are."""
    kept = {key: value for key, value in manifest.items() if key not in RESULTS}
    for group, free in FREE:
        if group in kept:
            kept[group] = {key: value for key, value in kept[group].items() if key != free}
    if "features" in kept:
        free_of = {name: {**own, "weights": None} for name, own in kept["features"]["teachers"].items()}
        kept["features"] = {**kept["features"], "teachers": free_of}
    if "text" in kept:
        kept["text"] = {**kept["text"], "encoder": {**kept["text"]["encoder"], "weights": None}}
    return kept


def store_digest(manifest: Mapping[str, Any]) -> str:
    """What the shards of a store have in common; each names it."""
    return digest(json.dumps(fixed(manifest), sort_keys=True))


def fingerprint(manifest: Mapping[str, Any]) -> str:
    """What a complete store holds: the same shards are the same data, wherever they were made."""
    return digest(json.dumps([fixed(manifest), manifest["shards"]], sort_keys=True))
