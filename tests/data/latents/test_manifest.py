from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from genfound.data.latents.manifest import FORMAT, MANIFEST, fingerprint, read_manifest, store_digest, write_manifest

EXAMPLE: dict[str, Any] = {
    "format": FORMAT,
    "tokenizer": {"name": "dc_ae", "weights": "hub/name", "scale": 0.41407},
    "views": ["native"],
    "source": {"root": "images", "holdout": None},
    "classes": ["böats", "n\udce9", "0"],
    "statistics": {"mean": [0.1, -1e-9], "std": [1.0, 2.0]},
    "shards": [{"file": "train-00000.safetensors", "entries": 3, "bytes": 90, "crc32": 17, "replaced": 0}],
}


def test_a_manifest_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_manifest(tmp_path, EXAMPLE)
    assert read_manifest(tmp_path) == EXAMPLE
    whole = (tmp_path / MANIFEST).read_bytes()
    write_manifest(tmp_path, read_manifest(tmp_path))
    assert (tmp_path / MANIFEST).read_bytes() == whole


@pytest.mark.parametrize("bit", [0x01, 0x40, 0x80])
def test_any_flipped_bit_is_found(tmp_path: Path, bit: int) -> None:
    write_manifest(tmp_path, EXAMPLE)
    whole = (tmp_path / MANIFEST).read_bytes()
    for place in range(len(whole)):
        (tmp_path / MANIFEST).write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=r"manifest\.json is damaged; the command that encoded the store makes"):
            read_manifest(tmp_path)


def test_a_cut_manifest_is_damaged(tmp_path: Path) -> None:
    write_manifest(tmp_path, EXAMPLE)
    whole = (tmp_path / MANIFEST).read_text()
    for text in ("", whole[:-1], whole[: len(whole) // 2], whole + "\n", "[]", "{}", json.dumps(EXAMPLE)):
        (tmp_path / MANIFEST).write_text(text)
        with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
            read_manifest(tmp_path)


def test_the_first_format_had_no_checksum_and_is_named(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text(json.dumps({**EXAMPLE, "format": "genfound latents 1"}))
    with pytest.raises(ValueError, match=r"is of format genfound latents 1, not genfound latents 2; encode the store"):
        read_manifest(tmp_path)


def test_the_place_of_images_and_weights_is_no_part_of_the_data() -> None:
    moved = copy.deepcopy(EXAMPLE)
    moved["source"]["root"], moved["tokenizer"]["weights"] = "elsewhere", "folder"
    moved["statistics"] = None
    assert (store_digest(moved), fingerprint(moved)) == (store_digest(EXAMPLE), fingerprint(EXAMPLE))
    for change in ({"views": ["256"]}, {"classes": ["0"]}, {"source": {"root": "images", "holdout": 2}}):
        assert store_digest({**EXAMPLE, **change}) != store_digest(EXAMPLE)
    other = copy.deepcopy(EXAMPLE)
    other["shards"][0]["crc32"] = 18
    assert store_digest(other) == store_digest(EXAMPLE)
    assert fingerprint(other) != fingerprint(EXAMPLE)
