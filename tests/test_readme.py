"""The tables of the README say what the fixtures and the configuration say; so do the paths of CONTRIBUTING.md."""

from __future__ import annotations

import collections
import re
from pathlib import Path

from genfound.checkpoints.official.families import FAMILIES
from genfound.config import targets
from tests.golden.runner import COMMITTED, fixture_files, read
from tests.helpers import composed

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
TOPICS = {
    "DiT": ["dit"], "SiT": ["sit"], "FiT, FiTv2": ["fit", "fitv2"], "NiT": ["nit"], "DiT-MoE": ["dit_moe"],
    "LightningDiT": ["lightningdit"], "JiT": ["jit"], "DiG": ["dig"], "DiM": ["dim"], "LDM": ["ldm"],
}  # fmt: skip
"""Row of the table -> the families of it; the first one is the topic of its fixtures."""

COLUMNS = {
    "loss": r"diffusion\.(?!ancestral|ddim)|transport|.*loss|t_sampling|rf_train$|.*train_steps|nit_(train|score)|ddpm",
    "sampler": r"diffusion\.(ancestral|ddim)|.*sampl|.*time_grid",
    "data": r"data|latent_dataset|.*collate|.*resize|pack|dataset_item|.*uint8|vae_scale",
    "forward": r".*",
}
"""Column -> the kinds of its fixtures; the first that matches counts."""


def cases(topic: str) -> collections.Counter[str]:
    """The number of committed golden fixtures of a topic in each column."""
    kinds = [read(file)["kind"] for file in fixture_files(COMMITTED / topic)]
    return collections.Counter(next(c for c, pattern in COLUMNS.items() if re.match(pattern, kind)) for kind in kinds)


def rows(heading: str) -> list[list[str]]:
    """The cells of the table whose heading begins so."""
    table = README[README.index(f"| {heading} |") :].partition("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_every_golden_case_is_counted_where_it_belongs() -> None:
    table = {row[0]: row[1:] for row in rows("family")}
    assert table.keys() == TOPICS.keys()
    for name, (topic, *_) in TOPICS.items():
        found = cases(topic)
        assert table[name][:4] == [str(found[column] or "") for column in ("forward", "loss", "sampler", "data")], name
    assert f"{len(fixture_files(COMMITTED))} cases" in README


def test_every_family_is_loaded_and_has_a_preset_that_the_tests_train() -> None:
    assert {family for families in TOPICS.values() for family in families} == FAMILIES.keys()
    tiny = {file.stem for file in (ROOT / "conf/model").glob("*_tiny.yaml")}
    assert {name for row in rows("family") for name in re.findall(r"`(\w+)`", row[6])} == tiny
    assert all(row[5] == "yes" for row in rows("family"))


def test_all_models_are_listed() -> None:
    listed = {name for row in rows("model") for name in re.findall(r"`(\w+)`", row[1])}
    files = (ROOT / "conf/model").glob("*.yaml")
    assert listed == {file.stem for file in files if "???" not in file.read_text() and file.stem != "fitnet"}


def test_every_model_is_listed_with_its_layouts() -> None:
    for _, sizes, layouts in rows("model"):
        for name in re.findall(r"`(\w+)`", sizes):
            kind = targets.target("model", composed(f"model={name}")["model"], ())
            assert set(re.findall(r"`(\w+)`", layouts)) == {*kind.layouts}, name


def test_contributing_names_what_is_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    paths = re.findall(r"`((?:src|conf|tests|docs)/[\w/.]+)`", text)
    assert len(paths) > 10 and all((ROOT / path).exists() for path in paths), paths
