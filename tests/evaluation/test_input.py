import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from genfound.checkpoints.load import hints_of
from tests.evaluation.runs import TINY, evaluated, of_probe, probe, untrained_run
from tests.helpers import composed
from tests.image_sets import Pictures, save_pngs


def wrong(folder: Path, run: Path, references: Path) -> dict[str, tuple[Path, dict[str, Any], str]]:
    """name -> (from, settings, message)."""
    np.savez(folder / "floats.npz", np.zeros((9, 16, 16, 3)))
    np.savez(folder / "few.npz", np.zeros((40, 16, 16, 3), np.uint8))
    np.savez(folder / "stats.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    (folder / "empty").mkdir()
    (folder / "litter").mkdir()
    (folder / "litter/.DS_Store").touch()
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    few, many = (save_pngs(folder / name, Pictures([(16, 16)] * n)) for name, n in (("few", 40), ("many", 80)))
    tool = {"extractor_weights": probe(references), "reference": str(few)}
    at = {"sizes": [16, 16]}
    (folder / "none").mkdir()
    row = {"size": [16, 16], "guidance": {"name": "cfg"}}
    flipped = bytearray((folder / "few.npz").read_bytes())
    flipped[20_000] ^= 1
    (folder / "flipped.npz").write_bytes(flipped)
    return {
        "a size that does not divide": (run, {"sizes": [15, 16]}, r"nearest legal sizes are \[14,16\] and \[16,16\]"),
        "a size that is none": (run, {"sizes": [16]}, r"sizes=\[16\] must be \[height,width\]"),
        "a text as a size": (run, {"sizes": "large"}, "sizes=large must be"),
        "images of another size": (few, {**tool, "sizes": [32, 32]}, "holds images of 16x16 pixels, not 32x32"),
        "an empty folder": (folder / "empty", tool, "empty is an empty folder"),
        "an npz of floats": (folder / "floats.npz", tool, "arr_0 is float64 .* it must be uint8"),
        "too few samples": (run, {**at, "n": 40}, "n: 40 images are fewer than the 64 features of probe"),
        "too few given": (folder / "few.npz", tool, "n: 40 images are fewer than the 64 features"),
        "too few references": (run, {**at, "reference": str(few)}, "reference: 40 images are fewer than the 64"),
        "statistics of Inception": (run, {**at, "reference": str(folder / "stats.npz")}, "with the extractor incep"),
        "no reference": (run, {**at, "reference": str(folder / "absent.npz")}, "there is no file .*absent.npz"),
        "an empty reference": (run, {**at, "reference": str(folder / "empty")}, "holds no images"),
        "no split": (run, {**at, "reference": "data:test"}, "choose data, data:train or data:val"),
        "a view of several sizes": (run, {"sizes": "data", "reference_view": "crop"}, "view=crop needs samples of one"),
        "a view that is none": (run, {**at, "reference_view": "zoom"}, "reference_view=zoom is unknown"),
        "no image of the size": (run, {"sizes": [18, 18], "reference_view": "same_size"}, "no reference .* 18x18"),
        "an unknown extractor": (run, {**at, "extractor": "dino"}, "extractor=dino is unknown; choose"),
        "no weights": (run, {**at, "extractor": "inception"}, "weights=weights-inception.* is not there; download"),
        "a probe without data": (many, {"reference": str(few)}, "images alone tell no data set; give extractor_"),
        "data without a run": (many, {**tool, "reference": "data"}, "reference=data: images alone tell no data set"),
        "an unknown rule": (run, {**at, "labels": "sorted"}, "labels=sorted is unknown"),
        "unknown weights": (run, {**at, "weights": "best"}, "weights=best is unknown"),
        "an unknown byte rule": (run, {**at, "uint8": "floor"}, "uint8=floor is unknown"),
        "an npz of several sizes": (run, {"sizes": "data", "export": "x.npz"}, "an npz file holds images of one size"),
        "a convention": (run, {**at, "convention": "clean"}, "convention=clean is unknown"),
        "nothing to compare with": (run, {**at, "compare": ["nowhere"]}, "there are no results nowhere"),
        "a convention of Inception": (run, {**at, "convention": "adm_half"}, "adm_half is one of Inception's figures"),
        "a folder without results": (run, {**at, "compare": [str(folder / "none")]}, "compare: .*none holds no"),
        "no process": (run, {**at, "devices": -1}, "devices=-1 must be a whole number of at least 1"),
        "processes by name": (run, {**at, "devices": "two"}, "devices=two must be"),
        "no image a call": (run, {**at, "batch": 0}, "batch=0 must be"),
        "fewer than no reference": (run, {**at, "reference_images": -5}, "reference_images=-5 must be"),
        "samples without an end": (run, {**at, "n": None}, "n=null must be a whole number"),
        "no seed": (run, {**at, "seed": None}, "seed=null must be a whole number"),
        "no sample": (few, {**tool, "n": 0}, "n=0 must be"),
        "a row without a sampler": (run, {"table": [row]}, "table: the row of 16x16 must have a sampler with its name"),
        "a row without a size": (run, {"table": [{}]}, "table: .* must have size, sampler and guidance"),
        "images of one size of two": (many, {**tool, "sizes": [[16, 16], [8, 8]]}, "16x16 pixels, not 16x16 and 8x8"),
        "a flipped byte": (folder / "flipped.npz", tool, r"flipped.npz is damaged .*Bad CRC-32 for file .arr_0.npy"),
        "no such rule of positions": (run, {**at, "rope": {"rule": "yarm"}}, "rule=yarm is unknown"),
        "a large image": (few, {**tool, "max_pixels": 255}, "0000.png .*16 x 16 pixels are more than max_pixels=255"),
        "no pixel": (few, {**tool, "max_pixels": 0}, "max_pixels=0 must be"),
        "only litter": (folder / "litter", tool, "litter is an empty folder"),
        "nothing there": (folder / "nowhere", {}, "nowhere"),
    }  # fmt: skip


def test_wrong_input_is_one_line_before_anything_is_drawn(run: Path, references: Path, tmp_path: Path) -> None:
    for name, (source, given, message) in wrong(tmp_path, run, references).items():
        with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
            evaluated(source, references, out=str(tmp_path / "out"), **given)
        assert "\n" not in str(caught.value), name
        assert not [path for path in tmp_path.glob("out/**/*") if path.is_file()], name


def test_damaged_results_are_found_before_anything_is_drawn(run: Path, references: Path, tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text("{")
    with pytest.raises(ValueError, match="holds a line that is not a result"):
        evaluated(run, references, sizes=[16, 16], out=str(tmp_path))
    assert [file.name for file in tmp_path.iterdir()] == ["results.jsonl"]


def test_a_probe_is_trained_when_nothing_else_is_wrong(run: Path, tmp_path: Path) -> None:
    for wrong_setting in ({"convention": "clean"}, {"labels": "sorted"}, {"sizes": [15, 16]}):
        with pytest.raises(ValueError, match=r"unknown|nearest"):
            evaluated(run, tmp_path / "references", **wrong_setting, out=str(tmp_path / "out"))
    assert not (tmp_path / "references").exists()


def test_a_making_that_is_not_told_whole_is_unknown(run: Path, references: Path, tmp_path: Path) -> None:
    tool = {"extractor_weights": probe(references), "reference": of_probe(references)}
    for name, note in (("a", "[1]"), ("b", '{"drawing": {"seed": 0}, "subject": 3}'), ("c", "5")):
        np.savez(tmp_path / f"{name}.npz", np.stack(Pictures([(16, 16)] * 80).images), protocol=np.array(note))
        result = evaluated(tmp_path / f"{name}.npz", references, **tool)[0]
        assert result.protocol.drawing.seed == "unknown" and result.subject["from"].endswith(f"{name}.npz")


def test_foreign_images_are_measured_and_their_making_is_unknown(
    run: Path, references: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluated(run, references, sizes=[16, 16], out=str(tmp_path / "out"))
    np.savez(tmp_path / "theirs.npz", np.stack(Pictures([(16, 16)] * 80).images))
    reference = str(next(file for file in references.glob("*.npz")))
    options = {"extractor_weights": probe(references), "reference": reference, "compare": [str(tmp_path / "out")]}
    result = evaluated(tmp_path / "theirs.npz", references, **options)[0]
    assert result.protocol.drawing.sampler == "unknown" and result.protocol.count == 80
    assert "accuracy_probe" not in result.figures
    assert "drawing (unknown)" in capsys.readouterr().out.splitlines()[-1]


def test_mixed_sizes_are_measured_and_labelled(references: Path, tmp_path: Path, run: Path) -> None:
    folder = save_pngs(tmp_path / "mixed", Pictures([(16, 16), (12, 20)] * 40))
    reference = str(next(references.glob("*.npz")))
    result = evaluated(folder, references, extractor_weights=probe(references), reference=reference)[0]
    assert result.protocol.size == "mixed"


def test_the_folder_of_a_run_may_be_where_one_is(
    run: Path, references: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = save_pngs(tmp_path / "given", Pictures([(16, 16)] * 80))
    monkeypatch.chdir(given)
    tool = {"extractor_weights": probe(references), "reference": of_probe(references)}
    evaluated(Path(), references, **tool)
    assert (tmp_path / "given.evaluations/results.jsonl").is_file()


OUTPUTS = {
    "a file as out": ({"out": "a.png"}, "out=.*a.png is not a folder; choose another out="),
    "a file on the way to out": ({"out": "a.png/b/c"}, "out=.*c: .*a.png is not a folder"),
    "references in a file": (
        {"references": "a.png/b"},
        "references=.*b: .*a.png is not a folder; choose",
    ),
    "an export below a file": ({"export": "a.png/x"}, "export=.*a.png: .*a.png is not a folder"),
    "an npz that is a folder": ({"export": "taken.npz"}, r"export=.*taken.npz is a folder; give a file ending in .npz"),
    "a full folder": ({"export": "full"}, "export=.*full exists; give an empty folder"),
    "one of two taken": ({"export": "two", "sizes": [[16, 16], [12, 12]]}, "export=.*two-12x12 exists; give an empty"),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_impossible_outputs_are_refused_before_the_work(
    name: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for folder in ("taken.npz", "full/x", "two-12x12/x"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.setattr("genfound.evaluation.evaluator.prepare_extractor", lambda *_: pytest.fail("work was begun"))
    settings, message = OUTPUTS[name]
    paths = {key: str(tmp_path / value) for key, value in settings.items() if isinstance(value, str)}
    options = {"sizes": [16, 16], "out": str(tmp_path / "out"), **settings, **paths}
    references = Path(str(options.pop("references", tmp_path / "kept")))
    with pytest.raises(ValueError, match=message):
        evaluated(run, references, **options)


def folder_run(root: Path) -> Path:
    """A run on a folder of images, as it was trained from `root`: its paths are relative to it."""
    for seed, name in enumerate(("p", "q")):
        save_pngs(root / "images" / name, Pictures([(16, 16)] * 60, seed))
    of = [override for override in TINY if not override.startswith(("data.images", "data.sides"))]
    data = ["data=image_folder", "data.root=images", "tokenizer=pixel", "data.num_workers=0", "name=x"]
    return untrained_run(root / "runs/default/x", *data, of=of)


QUICK = {"n": 70, "reference_images": 70, "sizes": "data", "labels": "data"}


def test_a_run_is_measured_wherever_it_and_its_images_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("origin", "elsewhere"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "origin")
    run = folder_run(tmp_path / "origin")
    options, references = {**QUICK, "out": str(tmp_path / "out")}, tmp_path / "references"
    at_home = evaluated(run, references, **options)[0]
    monkeypatch.chdir(tmp_path / "elsewhere")
    results = [evaluated(run, references, **options)[0]]
    copy = tmp_path / "copied/run"
    (copy / "checkpoints").mkdir(parents=True)
    shutil.copy(run / "config.yaml", copy)
    shutil.copy(next((run / "checkpoints").glob("*.ckpt")), copy / "checkpoints")
    moved = (tmp_path / "origin/images").rename(tmp_path / "moved")
    for source in (run, copy):
        with pytest.raises(FileNotFoundError, match=r"data.root=images is not a folder"):
            evaluated(source, references, **options)
        data = {"root": str(moved), "index": str(tmp_path / "index")}
        results += evaluated(source, references, **options, data=data)
    assert all(result.figures == at_home.figures for result in results)
    (moved / "r").mkdir()
    shutil.copy(moved / "p/0000.png", moved / "r")
    with pytest.raises(ValueError, match=r"data.root=.*moved has 3 classes, and the run was trained on 2"):
        evaluated(copy, references, **options, data={"root": str(moved), "index": str(tmp_path / "index")})


def test_hidden_files_choose_nothing(references: Path, run: Path, tmp_path: Path) -> None:
    folders = [save_pngs(tmp_path / name, Pictures([(16, 16)] * 80, seed)) for seed, name in enumerate("ab")]
    for folder, name in zip(folders, ("._x.safetensors", "._x.npz"), strict=True):
        (folder / name).write_text("what another system leaves beside a file")
    tool = {"extractor_weights": probe(references), "reference": str(folders[1])}
    assert evaluated(folders[0], references, **tool, out=str(tmp_path / "out"))[0].protocol.reference["images"] == 80


def test_places_that_fit_nothing_are_refused(run: Path, references: Path, tmp_path: Path) -> None:
    at = {"sizes": [16, 16], "out": str(tmp_path / "out")}
    given = save_pngs(tmp_path / "given", Pictures([(16, 16)] * 80))
    elsewhere = {"data": {"root": str(tmp_path), "index": None}}
    tool = {"extractor_weights": probe(references), "reference": of_probe(references)}
    with pytest.raises(ValueError, match=r"data.root is not an option of the data of .*run"):
        evaluated(run, references, **at, **elsewhere)
    with pytest.raises(ValueError, match=r"data.root: images alone have no data set"):
        evaluated(given, references, **tool, **elsewhere)
    with pytest.raises(FileNotFoundError, match=r"guidance.weights=nowhere: .*nowhere"):
        evaluated(run, references, "guidance=autoguidance", "guidance.weights=nowhere", **at)
    with pytest.raises(ValueError, match="tokenizer: Pixel"):
        evaluated(run, references, **at, tokenizer={"weights": "x"})


@pytest.mark.parametrize("name", ["sample", "evaluate"])
def test_the_commands_take_the_places_of_what_they_need(name: str) -> None:
    places = ["tokenizer.weights=w", *(["data.root=r", "data.index=i", "reference=x"] if name == "evaluate" else [])]
    config = composed("from=x", *places, name=name)
    assert hints_of(config)["tokenizer"] == "w"
    assert name == "sample" or config["data"] == {"root": "r", "index": "i"}
