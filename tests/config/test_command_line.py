from __future__ import annotations

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from genfound.config import command_line
from genfound.config.errors import USER_ERRORS, sentence
from genfound.runtime.run_directory import read_config
from tests.helpers import composed, run_dir


def test_a_device_without_memory_is_one_line_with_the_keys_that_help() -> None:
    reason = "CUDA out of memory. Tried to allocate 2.00 GiB. See documentation for Memory Management"
    with pytest.raises(USER_ERRORS) as caught, command_line.explain_oom("train"):
        raise torch.OutOfMemoryError(reason)
    message = str(caught.value)
    assert message.startswith("CUDA out of memory. Tried to allocate 2.00 GiB -- ") and "\n" not in message
    for key in ("data.max_tokens", "data.batch_size", "model.activation_checkpointing=true", "sample.batch"):
        assert key in message


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match=r"^shapes differ$"), command_line.explain_oom("train"):
        raise RuntimeError("shapes differ")


GRAMMAR = {
    "data.root=~/photos": "write data.root=$HOME/photos",
    "from=epoch=3.ckpt": """: 'from="epoch=3.ckpt"'""",
    "from=runs/x (1)/y": """: 'from="runs/x (1)/y"'""",
    "labels=[naïve,3,a b]": """: 'labels=["naïve",3,a b]'""",
    "seed=1\r": "holds a carriage return: save the script with Unix line ends",
    'name="a': """: 'name="\\"a"'""",
    "from=it's=1": "it'\"'\"'s=1",
}


@pytest.mark.parametrize("argument", GRAMMAR)
def test_what_the_grammar_refuses_is_answered_with_what_to_write(argument: str) -> None:
    with pytest.raises(ValueError) as error:
        command_line._parsed(["-m", "seed=1", argument])
    assert GRAMMAR[argument] in str(error.value)


def test_what_is_to_be_written_instead_means_what_was_meant() -> None:
    for text in ("epoch=3.ckpt", "runs/x (1)/y", 'a "b" c\\', "naïve"):
        (override,) = command_line._parsed([f"from={command_line._quoted(text)}"])
        assert override.value() == text


def test_the_run_behind_a_quoted_path_is_found(tmp_path: Path) -> None:
    folder = run_dir(tmp_path / "a=b (1)", "sampler=heun", "guidance=autoguidance", 'guidance.weights="w=1"')
    origin = f"from={command_line._quoted(str(folder))}"
    found = command_line.with_origin(lambda given: read_config(Path(given["from"])), ["-m", origin])
    assert found == ["-m", "sampler=heun", "guidance=autoguidance", 'guidance.weights="w=1"', origin]


OF_A_FILE = {
    "a target among keys": ({"guidance": {"power": {"_target_:shutil.rmtree,path": "x"}}}, "is no name of an option"),
    "grammar in a key": ({"sampler": {"name": "mine", "x=1,y": 2}}, "x=1,y is no name of an option"),
    "a variable in a key": ({"sampler": {"steps": {"a:${oc.env:HOME}": 1}}}, "holds an interpolation"),
    "a variable in an empty group": ({"sampler": {"steps": {"${oc.env:HOME}": {}}}}, "holds an interpolation"),
    "a variable behind a backslash": ({"sampler": {"steps": r"\${oc.env:HOME}"}}, "holds an interpolation"),
}


@pytest.mark.parametrize("case", OF_A_FILE)
def test_what_a_file_says_is_never_read_as_grammar(case: str) -> None:
    said, message = OF_A_FILE[case]
    usual = composed()
    config = {**usual, **{group: {**usual[group], **options} for group, options in said.items()}}
    with pytest.raises(ValueError, match=r"^runs/x: ") as error:
        command_line.with_origin(lambda _: config, ["from=runs/x"])
    assert message in str(error.value) and str(Path.home()) not in str(error.value)


def test_texts_of_a_file_stay_texts() -> None:
    sampler = {"name": "mine", "a": 'b" c\\', "d": [1, 2.5, None, True, "x,y"], "e": {"f": "{g}"}}
    added = command_line.with_origin(lambda _: {"sampler": sampler, "guidance": {"name": "none"}}, ["from=x"])
    found = {override.key_or_group: override.value() for override in command_line._parsed(added[1:-1])}
    assert {key.removeprefix("sampler."): value for key, value in found.items()} == {**sampler, "guidance": "none"}


def test_single_keys_of_a_sampler_from_elsewhere_come_after_its_own() -> None:
    config = {"sampler": {"name": "mine", "steps": 9}, "guidance": {"name": "none"}}
    assert command_line.with_origin(lambda _: config, ["sampler.steps=2", "from=x"]) == [
        "~sampler", '+sampler.name="mine"', "+sampler.steps=9", "guidance=none", "sampler.steps=2", "from=x",
    ]  # fmt: skip


def test_several_copies_of_a_command_are_refused_with_the_way_to_several_devices() -> None:
    expected = r"WORLD_SIZE=4: a launcher has started 4 copies of this command.*start it once with trainer\.devices=N"
    with pytest.raises(ValueError, match=expected):
        command_line._check_copies(OmegaConf.create({}), "WORLD_SIZE", 4, "train")


SYSTEM = {
    PermissionError(13, "Permission denied", "/data/x"): "/data/x: Permission denied; see that you may read and write",
    IsADirectoryError(21, "Is a directory", "out"): "out: Is a directory; a file is needed there, and it is a folder",
    OSError(28, "No space left on device"): "No space left on device; make room",
    FileNotFoundError(2, "No such file or directory", "a.pt"): "a.pt: No such file or directory",
    FileNotFoundError("there is no run x"): "there is no run x",
    ValueError("two\n  lines"): "two lines",
}


@pytest.mark.parametrize("error", SYSTEM, ids=str)
def test_errors_of_the_system_name_the_file_and_the_way_out(error: Exception) -> None:
    assert sentence(error).startswith(SYSTEM[error])
