import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from genfound import build
from genfound.evaluation import Asked, settings
from genfound.metrics.images import open_images
from genfound.metrics.protocol import differences, read_results
from genfound.metrics.reference import file_hash
from genfound.paths import config_dir
from genfound.sampling import check_size
from tests.helpers import composed
from tests.metrics.runs import evaluated, untrained_run
from tests.metrics.sets import Averages, Pictures, save_pngs


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return untrained_run(tmp_path_factory.mktemp("evaluated") / "run")


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared, as a user's are: the probe is trained once."""
    return tmp_path_factory.mktemp("references")


def probe(references: Path) -> str:
    return str(next(references.glob("probe-*.safetensors")))


def test_run_npz_and_folder_of_the_same_images_have_the_same_figures(
    run: Path, references: Path, tmp_path: Path
) -> None:
    files = [tmp_path / "x.npz", tmp_path / "x"]
    size = {"sizes": [12, 16], "reference_view": "crop"}
    drawn = [evaluated(run, references, **size, export=str(file), out=str(tmp_path / file.suffix))[0] for file in files]
    images = [open_images(file) for file in files]
    assert all(np.array_equal(images[0][k], images[1][k]) for k in range(96))
    reference = max(references.glob("*.npz"), key=lambda file: file.stat().st_mtime)
    options = {"extractor_weights": probe(references), "reference": str(reference), "reference_view": "crop"}
    given = [evaluated(file, references, **options)[0] for file in files]
    for result in (*drawn, *given):
        assert result.figures == drawn[0].figures
        assert differences(result.protocol, drawn[0].protocol) in ([], ["reference.rule"])
        assert result.subject["hash"] == drawn[0].subject["hash"]
    assert set(drawn[0].figures) == {"fd_probe", "accuracy_probe", "precision_probe", "recall_probe"}
    assert (tmp_path / "x.npz.evaluations/results.jsonl").is_file()


def test_a_result_names_everything_that_could_change_it(run: Path, references: Path, tmp_path: Path) -> None:
    options = {"sizes": [16, 16], "labels": "balanced", "out": str(tmp_path)}
    result = evaluated(run, references, "sampler=heun", "sampler.steps=2", "guidance.scale=3.5", **options)[0]
    protocol, drawing = result.protocol, result.protocol.drawing
    assert drawing.sampler == {"name": "heun", "steps": 2, "shift": 1.0}
    assert isinstance(drawing.guidance, dict)
    assert (drawing.guidance["scale"], drawing.guidance["channels"], drawing.guidance["interval"]) == (
        3.5,
        "all",
        [0, 1],
    )
    assert (drawing.weights, drawing.labels, drawing.seed, drawing.uint8) == ("ema", "balanced", 0, "round")
    assert drawing.precision == "32-true" and drawing.decoder == {"name": "Pixel", "precision": None, "hash": None}
    assert (protocol.count, protocol.size, protocol.convention) == (96, [16, 16], "adm")
    assert {"hash", "images", "points", "size", "view", "rule"} <= protocol.reference.keys()
    assert protocol.extractor["name"] == "probe" and "torch" in protocol.versions
    assert protocol.altered == ["n", "labels", "extractor", "reference_view"]
    assert result.subject["images_seen"] == 48 and result.subject["checkpoint"] == "step-00000003.ckpt"
    assert read_results(tmp_path) == [result]


def test_live_weights_and_another_seed_are_other_samples(run: Path, references: Path, tmp_path: Path) -> None:
    options = {"sizes": [16, 16], "out": str(tmp_path)}
    one, raw, seeded = (
        evaluated(run, references, **options, **more)[0] for more in ({}, {"weights": "raw"}, {"seed": 1})
    )
    assert differences(one.protocol, raw.protocol) == ["drawing.weights"]
    assert differences(one.protocol, seeded.protocol) == ["drawing.seed"]
    assert len({result.figures["fd_probe"] for result in (one, raw, seeded)}) == 3
    assert one.subject["hash"] == seeded.subject["hash"] != raw.subject["hash"]


def test_it_goes_on_where_it_was_stopped(
    run: Path, references: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from genfound.sampling import Sampling

    options = {"sizes": "data", "labels": "data", "n": 200}
    whole = evaluated(run, references, **options, out=str(tmp_path / "whole"))[0]
    draw, calls = Sampling.draw, []

    def failing(self: Sampling, *arguments: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return draw(self, *arguments, **more)

    monkeypatch.setattr(Sampling, "draw", failing)
    with pytest.raises(KeyboardInterrupt):
        evaluated(run, references, **options, out=str(tmp_path / "out"))
    assert len(list((tmp_path / "out/work").rglob("images-*.npy"))) == 2
    assert not (tmp_path / "out/results.jsonl").exists()
    calls[:] = [1] * 3
    resumed = evaluated(run, references, **options, out=str(tmp_path / "out"))[0]
    assert resumed.figures == whole.figures
    parts = len(calls) - 3
    assert 0 < parts < 8 and not (tmp_path / "out/work").exists()
    assert resumed.protocol.size == "data" and resumed.protocol.drawing.labels == "data"


def test_what_took_long_can_be_kept(run: Path, references: Path, tmp_path: Path) -> None:
    options = {"sizes": [16, 16], "keep": True, "out": str(tmp_path)}
    first = evaluated(run, references, **options)[0]
    files = {
        file: file.stat().st_mtime_ns for file in (tmp_path / "work").rglob("*.np[yz]") if "requests" not in file.name
    }
    again = evaluated(run, references, **options, reference="data:val")[0]
    assert len(files) > 2 and all(file.stat().st_mtime_ns == stamp for file, stamp in files.items())
    assert first.figures["fd_probe"] != again.figures["fd_probe"]
    assert "reference.hash" in differences(first.protocol, again.protocol)


def test_several_sizes_in_one_command(
    run: Path, references: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"sizes": [[16, 16], [12, 20]], "reference_view": "crop", "export": str(tmp_path / "s.npz")}
    results = evaluated(run, references, **options, out=str(tmp_path / "out"))
    assert [result.protocol.size for result in results] == [[16, 16], [12, 20]]
    assert {file.name for file in tmp_path.glob("*.npz")} == {"s-16x16.npz", "s-12x20.npz"}
    assert [result.protocol.reference["size"] for result in results] == [[16, 16], [12, 20]]
    rows = capsys.readouterr().out.splitlines()[-3:]
    assert rows[1].endswith("adm_50k") and "differs: reference.hash, reference.size, size" in rows[2]


def test_a_folder_of_references_gives_each_size_its_own(run: Path, references: Path, tmp_path: Path) -> None:
    folder = tmp_path / "references"
    folder.mkdir()
    for size in ([16, 16], [12, 16]):
        evaluated(
            run,
            tmp_path / "made",
            sizes=size,
            reference_view="crop",
            extractor_weights=probe(references),
            out=str(tmp_path / "a"),
        )
    for file in (tmp_path / "made").glob("*.npz"):
        shutil.copy(file, folder)
    results = evaluated(run, references, sizes=[[12, 16], [12, 12]], reference=str(folder), out=str(tmp_path / "b"))
    told = [(result.protocol.reference["size"], result.protocol.reference["rule"]) for result in results]
    assert told == [([12, 16], "of this size"), ([16, 16], "square, of the nearest area")]


def test_a_table_gives_each_size_its_sampler_and_guidance_and_the_command_line_wins(
    run: Path, references: Path, tmp_path: Path
) -> None:
    rows = [
        {"size": size, "sampler": {"name": "heun", "steps": steps}, "guidance": {"name": "cfg", "scale": scale}}
        for size, steps, scale in (([16, 16], 2, 1.5), ([12, 12], 3, 2.0))
    ]
    options = {"table": rows, "out": str(tmp_path)}
    results = evaluated(run, references, "guidance.scale=4.0", **options)
    found = [(r.protocol.size, r.protocol.drawing.sampler, r.protocol.drawing.guidance["scale"]) for r in results]  # type: ignore[index]
    assert found == [
        ([16, 16], {"name": "heun", "steps": 2, "shift": 1.0}, 4.0),
        ([12, 12], {"name": "heun", "steps": 3, "shift": 1.0}, 4.0),
    ]
    with pytest.raises(ValueError, match="protocol=adm_50k has no row for 12x16; add one to table"):
        evaluated(run, references, **options, sizes=[12, 16])


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
    evaluated(run, references, sizes=[16, 16], out=str(tmp_path / "out"))
    folder = save_pngs(tmp_path / "mixed", Pictures([(16, 16), (12, 20)] * 40))
    reference = str(next(references.glob("*.npz")))
    result = evaluated(folder, references, extractor_weights=probe(references), reference=reference)[0]
    assert result.protocol.size == "mixed"


def wrong(folder: Path, run: Path, references: Path) -> dict[str, tuple[Path, dict[str, Any], str]]:
    """name -> (from, settings, message)."""
    np.savez(folder / "floats.npz", np.zeros((9, 16, 16, 3)))
    np.savez(folder / "few.npz", np.zeros((40, 16, 16, 3), np.uint8))
    np.savez(folder / "stats.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    (folder / "empty").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    few, many = (save_pngs(folder / name, Pictures([(16, 16)] * n)) for name, n in (("few", 40), ("many", 80)))
    tool = {"extractor_weights": probe(references), "reference": str(few)}
    at = {"sizes": [16, 16]}
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
        "nothing there": (folder / "nowhere", {}, "nowhere"),
    }  # fmt: skip


def test_wrong_input_is_one_line_before_anything_is_drawn(run: Path, references: Path, tmp_path: Path) -> None:
    evaluated(run, references, sizes=[16, 16], out=str(tmp_path / "first"))
    for name, (source, given, message) in wrong(tmp_path, run, references).items():
        with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
            evaluated(source, references, out=str(tmp_path / "out"), **given)
        assert "\n" not in str(caught.value), name
        assert not [path for path in tmp_path.glob("out/**/*") if path.is_file()], name


def test_the_note_of_an_export_is_its_protocol(run: Path, references: Path, tmp_path: Path) -> None:
    evaluated(run, references, sizes=[16, 16], export=str(tmp_path / "x"), out=str(tmp_path / "out"))
    note = json.loads((tmp_path / "x/protocol.json").read_text())
    assert note["drawing"]["sampler"]["name"] == "euler" and note["subject"]["checkpoint"] == "step-00000003.ckpt"


def test_adms_own_file_gives_its_statistics_for_the_distances_and_its_images_for_the_shares(
    run: Path, references: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("references", "extraction"):
        monkeypatch.setattr(f"genfound.{module}.open_extractor", lambda *_: Averages())
    real = np.stack(Pictures([(16, 16)] * 90).images)
    mu, mu_s = np.full(6, 30.0), np.full(4, 2.0)
    np.savez(tmp_path / "adm.npz", arr_0=real, mu=mu, sigma=np.eye(6), mu_s=mu_s, sigma_s=np.eye(4))
    np.savez(tmp_path / "images.npz", real)
    options = {"extractor": "inception", "sizes": [16, 16], "out": str(tmp_path / "out")}
    adm, images = (
        evaluated(run, references, reference=str(tmp_path / f"{name}.npz"), **options)[0] for name in ("adm", "images")
    )
    names = ["fid@96", "sfid@96", "inception_score@96", "precision@96", "recall@96"]
    assert list(adm.figures) == list(images.figures) == sorted(names, key=names.index)
    assert adm.figures["fid@96"] > 10 * images.figures["fid@96"]
    assert adm.figures["precision@96"] == images.figures["precision@96"]
    assert adm.protocol.reference["hash"] == file_hash(tmp_path / "adm.npz")
    assert adm.protocol.reference["images"] is None and adm.protocol.reference["points"] == 90
    with np.load(tmp_path / "adm.npz") as file:
        only = {key: file[key] for key in ("mu", "sigma")}
    np.savez(tmp_path / "edm.npz", **only)
    edm = evaluated(run, references, reference=str(tmp_path / "edm.npz"), **options)[0]
    assert edm.figures["fid@96"] == adm.figures["fid@96"]
    assert set(edm.figures) == {"fid@96", "inception_score@96"}


def test_nits_table_is_complete_and_fits_its_model() -> None:
    config = composed("protocol=nit", "from=x", "reference=y", name="evaluate")
    asked = Asked(config, ["protocol=nit"], "nit")
    run = composed("model=nit_xl", "data=imagenet_native", "data.root=x")
    found = {}
    for row in config["table"]:
        how = settings(asked, run, tuple(row["size"]))
        build.objective(how)
        check_size(tuple(row["size"]), 32)
        assert how["sample"]["uint8"] == "truncate" and how["guidance"]["channels"] == "all"
        found[tuple(row["size"])] = (how["sampler"]["name"], how["sampler"]["steps"], how["guidance"]["scale"])
    assert len(found) == 12
    assert found[256, 256] == ("sde", 250, 2.25) and found[320, 960] == ("euler", 50, 4.0)
    assert settings(asked, run, (512, 512))["guidance"]["interval"] == [0, 0.7]


@pytest.mark.parametrize("name", sorted(file.stem for file in (Path(config_dir()) / "protocol").glob("*.yaml")))
def test_named_protocols_set_known_keys_only(name: str) -> None:
    everything = composed("protocol=adm_50k", "from=x", "reference=y", name="evaluate")
    named = composed(f"protocol={name}", "from=x", "reference=y", name="evaluate")
    assert named.keys() == everything.keys()
