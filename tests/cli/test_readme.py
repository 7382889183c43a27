"""Every command that the README and the guides show runs as shown (trainings cut short)."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import hydra
import pytest
import torch

from genfound import build
from genfound.checkpoints.official import dit
from genfound.config import compose
from genfound.runtime import run_directory
from tests.cli.commands import TINY, genfound, variables
from tests.cli.test_image_folder import photographs
from tests.cli.test_text import captioned
from tests.data.images.test_archives import webdataset
from tests.helpers import composed
from tests.hub import hub

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SHORT = [*TINY, "batch.images=16", "trainer.max_steps=2", "data.max_tokens=1024", "batch.packs=2"]


def commands(page: Path) -> list[list[str]]:
    """The `python -m genfound...` lines of a page, as words, without variables before them."""
    lines = re.findall(r"^    (?:[A-Z_]+=\S+ )*python -m genfound\.(.*)$", page.read_text(), re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


def sized_for_a_test(arguments: list[str]) -> list[str]:
    """The arguments with a small, short training behind them; what they set themselves stays."""
    own = {argument.partition("=")[0] for argument in arguments}
    folder = ["data.max_image_tokens=64", "data.num_workers=0"] if "data=image_folder" in arguments else []
    own |= {"model.depth"} if "alignment" in own else set()  # a block of this number must be there
    own |= {"model.heads"} if "model=dim_tiny" in arguments else set()  # which has none
    return arguments + [extra for extra in SHORT + folder if extra.partition("=")[0] not in own]


def released(file: Path) -> None:
    """A file like DiT's release, of its smallest size."""
    config = composed("model=dit_s")
    net = build.net(config, build.published_spec(config), 1000)
    torch.save(dit.to_official(net.state_dict(), 2, (16, 16)), file)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_run(page: Path, tmp_path: Path) -> None:
    photographs(tmp_path / "photos", 12)
    webdataset(tmp_path / "tars")
    captioned(tmp_path / "captioned")
    if "DiT-XL" in page.read_text():
        released(tmp_path / "DiT-XL-2-256x256.pt")
    for name, *shown in commands(page):
        arguments = sized_for_a_test(shown) if name == "train" else shown
        if {"model=nit_xl", "model=nit_t2i_xl"} & set(arguments) or (
            name == "sample" and "from=DiT-XL-2-256x256.pt" in arguments
        ):
            with hydra.initialize_config_dir(compose.config_dir(), version_base="1.3"):
                hydra.compose(name, shown)
            continue
        if name == "train" and "-m" not in shown and not any(word.startswith("name=") for word in shown):
            arguments.append(f"name={run_directory.run_name(shown)}")
        if name == "fetch":
            with hub(tmp_path / "hub") as (address, _):
                result = genfound(name, *arguments, cwd=tmp_path, HF_ENDPOINT=address, HF_HOME=str(tmp_path / "hf"))
        else:
            result = genfound(name, *arguments, cwd=tmp_path)
        assert result.returncode == 0, (name, arguments, result.stderr)
    for code in re.findall(r"```python\n(from diffusers .*?)```", page.read_text(), re.DOTALL):
        command = [sys.executable, "-c", f"{code}print(image.size)"]
        modules = variables(HF_MODULES_CACHE=str(tmp_path / "modules"))
        done = subprocess.run(command, cwd=tmp_path, env=modules, capture_output=True, text=True, check=False)
        assert done.stdout.strip() == "(20, 16)", done.stderr


@pytest.mark.slow
def test_the_python_example_runs(tmp_path: Path) -> None:
    example = re.search(r"```python\n(import genfound\n.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert example
    trained = genfound("train", *TINY, "trainer.max_steps=1", "name=default", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    code = example[1] + "print(images.dtype, images.shape)"
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=variables(), capture_output=True, text=True, check=False
    )
    assert shown.stdout.strip() == "uint8 (2, 16, 24, 3)", shown.stderr


def test_the_make_targets_of_the_readme_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    shown = set(re.findall(r"^    make ([a-z-]+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert shown and shown <= targets


def test_the_readme_names_all_options() -> None:
    """Those of models are in a table of their own; see tests/test_readme.py."""
    table = re.findall(r"^\| `(\w+)` \| (.*) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert {"data", "objective", "sampler", "guidance", "optimizer"} <= dict(table).keys()
    for group, options in table:
        there = {file.stem for file in (ROOT / "conf" / group).glob("*.yaml")}
        assert set(re.findall(r"`([a-z0-9_]+)`", options)) == there, group
