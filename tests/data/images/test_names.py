from __future__ import annotations

import os
import pickle
from pathlib import Path

from genfound.data.images.names import Names, shown
from genfound.runtime.files import visible

ODD = ["n01/a.png", "n01/ü 日.png", "n01/line\nbreak.png", os.fsdecode(b"n01/caf\xe9.png"), "n01/tab\t.png"]


def test_names_come_back_as_they_were() -> None:
    for names in (ODD, ["one"], []):
        kept = pickle.loads(pickle.dumps(Names(names)))
        assert [kept[i] for i in range(len(kept))] == names
    assert Names(ODD).table == b"\0".join(map(os.fsencode, ODD))


def test_a_million_names_are_small() -> None:
    names = [f"n{i % 1000:08d}/n{i % 1000:08d}_{i}.JPEG" for i in range(20_000)]
    assert len(pickle.dumps(Names(names))) < 40 * len(names)


def test_any_name_can_be_printed_in_one_line() -> None:
    lines = [shown(name) for name in ODD]
    assert lines[:2] == ODD[:2]
    assert lines[2:] == ["n01/line\\nbreak.png", "n01/caf\\udce9.png", "n01/tab\\t.png"]
    assert all(line.encode() for line in lines)


def test_hidden_files_and_litter_are_not_visible(tmp_path: Path) -> None:
    for name in ("b.png", "a.png", "._a.png", ".DS_Store", "Thumbs.db", "thumbs.png", "__MACOSX", "Desktop.ini"):
        (tmp_path / name).touch()
    assert [path.name for path in visible(tmp_path)] == ["a.png", "b.png", "thumbs.png"]
    assert [path.name for path in visible(tmp_path, "a.*")] == ["a.png"]
    assert visible(tmp_path / "absent") == []
