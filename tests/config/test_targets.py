"""What a file may choose to be built: classes of genfound of the right kind, and of packages that are trusted."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import genfound
from genfound import build
from genfound.backbones.nit import NiT
from genfound.checkpoints import convert, formats, initialise
from genfound.config import compose, targets
from genfound.config.environment import LAUNCH
from genfound.data.latents.manifest import read_manifest
from genfound.evaluation.evaluator import evaluate
from genfound.evaluation.protocol import EvaluationRequest
from genfound.runtime import run_directory
from genfound.sampling.pipeline import Pipeline
from genfound.tokenizers import PixelTokenizer
from genfound.training import CONFIG, _worker
from tests.evaluation.runs import untrained_run
from tests.helpers import composed, fresh_nit, linear_flow, training_module

PIXEL = "genfound.tokenizers.pixel.PixelTokenizer"
MARK = 'from pathlib import Path\nPath(__file__).with_name("imported").touch()\n'
CLASSES = """
from subprocess import call
from genfound.backbones.nit import NiT
from genfound.objectives.flow import Flow

class Own(NiT):
    pass

def make(**options):
    return Own(**options)
"""

NIT, FLOW = "genfound.backbones.nit.NiT", "genfound.objectives.flow.Flow"
FOREIGN, NO_CLASS, NO_NAME = "is code outside genfound", "is not a class of", "must be the dotted name"
NO_SAMPLER = "is not a sampler of"
INNER = {"y": [[{"_target_": "genfound.encoding.store_writer.StoreWriter"}]]}
ATTACKS: dict[str, tuple[str, Any, str]] = {
    "a function of the system": ("tokenizer", {"_target_": "subprocess.call", "args": ["touch", "pwned"]}, FOREIGN),
    "a module that acts when it is imported": ("model", {"_target_": "acting.Thing"}, FOREIGN),
    "a package whose name begins alike": ("model", {"_target_": "genfound_acting.Thing"}, FOREIGN),
    "a foreign class under a name of genfound": (
        "tokenizer",
        {"_target_": "genfound.runtime.run_directory.Path"},
        NO_CLASS,
    ),
    "its method": ("tokenizer", {"_target_": "genfound.runtime.run_directory.Path.write_text"}, "cannot be imported"),
    "a foreign module under a name of genfound": ("model", {"_target_": "genfound.build.os"}, NO_CLASS),
    "a function that writes": ("objective", {"_target_": "genfound.runtime.files.atomic_write"}, NO_CLASS),
    "a class of another group": ("tokenizer", {"_target_": "genfound.data.images.shapes.Shapes"}, "is no Tokenizer"),
    "a class of no group": ("model", {"_target_": "genfound.encoding.store_writer.StoreWriter"}, "is no Backbone"),
    "a function that is no sampler": ("sampler", {"_target_": "genfound.samplers.dopri5.integrate"}, NO_SAMPLER),
    "what declares samplers": ("sampler", {"_target_": "genfound.samplers.base.Sampler"}, NO_SAMPLER),
    "a foreign sampler": ("sampler", {"_target_": "acting.sampler"}, FOREIGN),
    "a sampler that guides": ("guidance", {"_target_": "genfound.samplers.ode.heun"}, NO_CLASS),
    "another sampler under a name": ("sampler", {"_target_": "acting.Thing", "name": "heun"}, "choose sampler=heun"),
    "a list": ("tokenizer", {"_target_": [PIXEL]}, NO_NAME),
    "a number": ("tokenizer", {"_target_": 3}, NO_NAME),
    "nothing": ("tokenizer", {}, NO_NAME),
    "a relative name": ("tokenizer", {"_target_": ".os.system"}, NO_NAME),
    "an empty part": ("tokenizer", {"_target_": "genfound..os.system"}, NO_NAME),
    "nested": ("tokenizer", {"_target_": PIXEL, "x": {"_target_": "acting.Thing"}}, rf"\.x\._target_=.*{FOREIGN}"),
    "in a list": ("objective", {"_target_": FLOW, "x": [{"_target_": "os.system"}]}, rf"\.x\.0\._target_=.*{FOREIGN}"),
    "nested and of no group": ("model", {"_target_": NIT, "x": INNER}, r"\.x\.y\.0\.0\._target_=.* is no Backbone or"),
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with modules beside it that leave a file when they are imported."""
    for name in ("acting", "genfound_acting"):
        (tmp_path / f"{name}.py").write_text(MARK)
    (tmp_path / "mine.py").write_text(CLASSES)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "modules", {k: v for k, v in sys.modules.items() if k not in ("acting", "mine")})
    return tmp_path


def configuration(group: str, options: Any) -> dict[str, Any]:
    return {**composed("model=nit_tiny"), group: options}


def file_of(config: Any, file: Path) -> Path:
    note = {"config": config, "class_names": ["0"], "sizes": [[16, 16]]}
    save_file({"x": torch.zeros(1)}, file, {"genfound": json.dumps(note)})
    return file


def run_of(config: Any, folder: Path) -> Path:
    run_directory.write_config(folder, config, allow_changes=False)
    return folder


def guided_by(origin: Path) -> None:
    config = composed("model=nit_tiny", "guidance=autoguidance", f"guidance.weights={origin}")
    Pipeline.from_config(config, linear_flow(), PixelTokenizer(), torch.device("cpu"), 2)


def evaluation_of(origin: Path) -> None:
    config = composed("from=x", "reference=data", "protocol=quick", name="evaluate")
    evaluate(EvaluationRequest({**config, "from": str(origin), "references": "references"}, [], "quick"))


ENTRANCES: dict[str, Callable[[Path], Any]] = {
    "load": genfound.load,
    "init_from": lambda origin: initialise.initialise(training_module(fresh_nit()), origin),
    "convert": lambda origin: convert.convert(origin, "out/", None),
    "guidance.weights": guided_by,
    "evaluate": evaluation_of,
}


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("kind", ["safetensors", "run"])
def test_a_file_chooses_no_code(kind: str, attack: str, place: Path) -> None:
    group, options, message = ATTACKS[attack]
    config = configuration(group, options)
    if kind == "safetensors":
        origin = named = file_of(config, place / "evil.safetensors")
    else:
        origin = run_of(config, place / "evil")
        named = origin / "config.yaml"
    before = sorted(place.rglob("*"))
    with pytest.raises(ValueError, match=rf"{named}: {group}.*{message}") as error:
        genfound.load(origin)
    assert "\n" not in str(error.value)
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize("entrance", ENTRANCES)
@pytest.mark.parametrize("attack", ["a function of the system", "a foreign class under a name of genfound"])
def test_at_no_entrance(entrance: str, attack: str, place: Path) -> None:
    group, options, message = ATTACKS[attack]
    origin = file_of(configuration(group, options), place / "evil.safetensors")
    if entrance == "evaluate":
        origin = untrained_run(place / "run")
        config = run_directory.read_config(origin) | {group: options}
        run_of(config, origin / "other")
        (origin / "other/config.yaml").replace(origin / "config.yaml")
    with pytest.raises(ValueError, match=message):
        ENTRANCES[entrance](origin)
    assert not (place / "pwned").exists() and not (place / "out").exists()


def test_data_are_built_of_no_code_of_a_file_either(place: Path) -> None:
    run = untrained_run(place / "run")
    loaded = genfound.load(run)
    foreign = {**loaded.config, "data": {**loaded.config["data"], "_target_": "acting.Thing"}}
    with pytest.raises(ValueError, match=r"data\._target_=acting.Thing is code outside genfound.*trust=\[acting\]"):
        build.source(foreign, PixelTokenizer.spec, "train")
    assert not (place / "imported").exists()


def test_what_is_never_built_of_a_file_may_name_anything(place: Path) -> None:
    config = configuration("trainer", {**composed()["trainer"], "callbacks": [{"_target_": "acting.Thing"}]})
    config["logger"] = {"_target_": "acting.Thing"}
    config["data"] = {**config["data"], "_target_": "acting.Thing"}
    assert targets.from_file(config, (), place / "x")["trust"] == []
    assert not (place / "imported").exists()


def own_model(place: Path, target: str) -> Path:
    """The file of a NiT whose class is the user's."""
    config = composed("model=nit_tiny", "model.width=32", "model.depth=1", "model.heads=2")
    net = build.net(config, PixelTokenizer.spec, 10)
    model = {**config["model"], "_target_": target}
    note = {"format": formats.FORMAT, "class_names": list("0123456789"), "sizes": [(16, 16)]}
    formats.write(place / "own.safetensors", net.state_dict(), {**note, "config": {**config, "model": model}})
    return place / "own.safetensors"


def test_a_package_of_ones_own_is_trusted_by_name(place: Path) -> None:
    file = own_model(place, "mine.Own")
    for trust in ([], ["min"], ["mine.Own.x"], ["other"]):
        with pytest.raises(ValueError, match=r"model\._target_=mine.Own is code outside.*set trust=\[mine\]"):
            genfound.load(file, trust=trust)
    assert "mine" not in sys.modules
    for trust in (["mine"], ["other", "mine"], "mine"):
        loaded = genfound.load(file, trust=trust)
        assert type(loaded.net).__name__ == "Own" and isinstance(loaded.net, NiT)
    with pytest.raises(ValueError, match=r"trust: \. is not the name of a package"):
        genfound.load(file, trust=["."])


def test_what_a_trusted_package_imports_is_not_trusted(place: Path) -> None:
    for target in ("mine.call", "mine.make"):
        with pytest.raises(ValueError, match=f"{target} is not a class of genfound or mine"):
            genfound.load(own_model(place, target), trust=["mine"])
    loaded = genfound.load(own_model(place, "mine.make"), trust=["mine.make"])
    assert type(loaded.net).__name__ == "Own"


def test_trust_reaches_every_entrance(place: Path) -> None:
    file = own_model(place, "mine.Own")
    net = build.net(
        composed("model=nit_tiny", "model.width=32", "model.depth=1", "model.heads=2"), PixelTokenizer.spec, 10
    )
    assert initialise.initialise(training_module(net), file, trust=["mine"])
    written = convert.convert(file, "copy/", "genfound", trust=["mine"]).file
    assert type(genfound.load(written, trust=["mine"]).net).__name__ == "Own"
    guidance = {"name": "autoguidance", "weights": str(file), "scale": 2.0}
    config = {**composed("model=nit_tiny"), "guidance": guidance, "trust": ["mine"]}
    assert Pipeline.from_config(config, linear_flow(), PixelTokenizer(), torch.device("cpu"), 2).guide is not None


def test_the_own_composition_is_trusted_as_it_is(place: Path) -> None:
    config = composed("model=nit_tiny", "model.width=32", "model.depth=1", "model.heads=2")
    config = compose.with_own_targets({**config, "model": {**config["model"], "_target_": "mine.make"}})
    assert config["trust"] == ["mine.make"]
    run = run_of(config, place / "run")
    assert type(build.net(run_directory.read_config(run), PixelTokenizer.spec, 10)).__name__ == "Own"
    with pytest.raises(ValueError, match=r"mine\.make is code outside genfound"):  # the file's own word counts nothing
        genfound.load(run)


def test_a_worker_trusts_only_what_its_command_has_written(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(configuration("model", {"_target_": "acting.Thing"}), place / "run")
    monkeypatch.setenv(CONFIG, run_directory.claimed_hash(run))
    monkeypatch.setenv(LAUNCH, str(place))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with open(run / "config.yaml", "a") as file:
        file.write("trust: [acting]\n")
    with pytest.raises(SystemExit):
        _worker(run)
    assert "is not what the command has written" in (place / "reason").read_text()
    assert not (place / "imported").exists()


def test_a_manifest_names_no_code(tmp_path: Path, place: Path) -> None:
    manifest = {"format": 1, "tokenizer": {"name": "acting.Thing", "_target_": "acting.Thing"}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="manifest"):
        read_manifest(tmp_path)
    assert not (place / "imported").exists()


MALFORMED = {
    "no groups": {"x": 1},
    "a group that is none": {**composed("model=nit_tiny"), "sampler": "heun"},
    "a list": [1, 2],
    "nothing": None,
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_what_is_no_configuration_is_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    file = file_of(MALFORMED[kind], tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=str(file)):
        genfound.load(file)


def test_notes_that_are_no_json_are_damage(tmp_path: Path) -> None:
    for note in ("{", "[" * 100_000, "3"):
        save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors", {"genfound": note})
        with pytest.raises(ValueError, match=r"x\.safetensors is damaged"):
            genfound.load(tmp_path / "x.safetensors")


def test_a_configuration_reads_no_variable_of_the_environment(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    run = run_of(composed("model=nit_tiny"), place / "run")
    text = (run / "config.yaml").read_text()
    for written in ("${oc.env:SECRET}", '"\\x24{oc.env:SECRET}"', "[a, '${seed}']"):
        (run / "config.yaml").write_text(text + f"extra: {written}\n")
        with pytest.raises(ValueError, match="holds an interpolation") as error:
            run_directory.read_config(run)
        assert "hunter2" not in str(error.value)


def test_a_configuration_does_not_grow_when_it_is_read(place: Path) -> None:
    run = run_of(composed("model=nit_tiny"), place / "run")
    levels = [f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 9)}]" for n in range(1, 12)]
    with open(run / "config.yaml", "a") as file:
        file.write("\n".join(["x0: &x0 [a, b]", *levels]) + "\n")
    with pytest.raises(ValueError, match="YAML aliases"):
        run_directory.read_config(run)


def test_options_are_looked_up_by_name_alone(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("steps: 3\n")
    for name in (str(tmp_path / "x"), "../sampler/heun", None, ["heun"]):
        with pytest.raises(ValueError, match="is unknown; choose one of ddim"):
            compose.read_option("sampler", name)  # type: ignore[arg-type]


def test_every_option_of_ours_may_be_built() -> None:
    for group, base in targets.BASES.items():
        for name in compose.option_names(group):
            options = compose.read_option(group, name)
            options = options.get("model", options)
            if "_target_" in options:
                found = targets.target(group, options, ())
                mro = (type(found) if group == "sampler" else found).__mro__
                assert base in [f"{one.__module__}.{one.__qualname__}" for one in mro], (group, name)
