import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from genfound import build
from genfound.config.compose import config_dir
from genfound.data.images.npz import file_hash
from genfound.data.images.sets import open_images
from genfound.evaluation import evaluator
from genfound.evaluation.protocol import EvaluationRequest, differences, read_results
from genfound.evaluation.samples import SampleStore
from genfound.runtime import checkpoint_io
from genfound.runtime.files import lock
from genfound.sampling.requests import check_size
from tests.evaluation.runs import evaluated, of_probe, probe, untrained_run
from tests.helpers import composed
from tests.image_sets import Averages, Pictures, save_pngs


@pytest.mark.slow
def test_run_npz_and_folder_of_the_same_images_have_the_same_figures(
    run: Path, references: Path, tmp_path: Path
) -> None:
    files = [tmp_path / "x.npz", tmp_path / "x"]
    size = {"sizes": [12, 16], "reference_view": "crop"}
    drawn = [evaluated(run, references, **size, export=str(file), out=str(tmp_path / file.suffix))[0] for file in files]
    images = [open_images(file) for file in files]
    assert all(np.array_equal(images[0][k], images[1][k]) for k in range(96))
    note = json.loads((tmp_path / "x/protocol.json").read_text())
    assert note["drawing"]["sampler"]["name"] == "euler" and note["subject"]["checkpoint"] == "step-00000003.ckpt"
    reference = max(references.glob("*.npz"), key=lambda file: file.stat().st_mtime)
    options = {"extractor_weights": probe(references), "reference": str(reference), "reference_view": "crop"}
    given = [evaluated(file, references, **options)[0] for file in files]
    for result in (*drawn, *given):
        in_order = result.protocol.order == "as stored"
        assert result.figures == (drawn[0].figures if in_order else pytest.approx(drawn[0].figures, rel=1e-9))
        assert differences(result.protocol, drawn[0].protocol) == []
        assert result.subject["hash"] == drawn[0].subject["hash"]
    assert set(drawn[0].figures) == {"fd_probe", "accuracy_probe", "precision_probe", "recall_probe"}
    assert [result.protocol.order for result in given] == ["as stored", "by content"]
    assert (tmp_path / "x.npz.evaluations/results.jsonl").is_file()


def test_precision_is_that_of_the_run_unless_it_is_set(references: Path, tmp_path: Path) -> None:
    run = untrained_run(tmp_path / "run", "trainer.precision=bf16")
    file = next(run.glob("checkpoints/*.ckpt"))
    state = checkpoint_io.read(file)
    average = {name: 0.2 * torch.randn_like(tensor) for name, tensor in state["ema"]["0.9"].items()}
    checkpoint_io.save({**state, "ema": {"0.9": average}}, file)
    made = {}
    for wanted, name in ((None, "bf16-mixed"), ("fp32", "32-true")):
        file = tmp_path / f"{name}.npz"
        result = evaluated(
            run, references, sizes=[16, 16], precision=wanted, export=str(file), out=str(tmp_path / name)
        )[0]
        assert result.protocol.drawing.precision == name
        made[name] = open_images(file)
    assert any((made["bf16-mixed"][k] != made["32-true"][k]).any() for k in range(96))


def test_a_result_names_everything_that_could_change_it(run: Path, references: Path, tmp_path: Path) -> None:
    options = {"sizes": [16, 16], "labels": "balanced", "out": str(tmp_path)}
    result = evaluated(run, references, "sampler=heun", "sampler.steps=2", "guidance.scale=3.5", **options)[0]
    protocol, drawing = result.protocol, result.protocol.drawing
    assert drawing.sampler == {"name": "heun", "steps": 2, "shift": 1.0, "guidance_at": "step"}
    assert isinstance(drawing.guidance, dict)
    assert (drawing.guidance["scale"], drawing.guidance["channels"], drawing.guidance["interval"]) == (
        3.5,
        "all",
        [0, 1],
    )
    assert (drawing.weights, drawing.labels, drawing.seed, drawing.uint8) == ("ema", "balanced", 0, "round")
    assert drawing.precision == "32-true" and drawing.decoder == {
        "name": "pixel",
        "precision": None,
        "hash": None,
    }
    assert (protocol.count, protocol.size) == (96, [16, 16])
    assert {"hash", "images", "points", "size", "view", "rule"} <= protocol.reference.keys()
    assert protocol.extractor["name"] == "probe" and "torch" in protocol.versions
    assert protocol.altered == [
        "n",
        "sizes",
        "labels",
        "extractor",
        "reference_view",
        "sampler",
        "sampler.steps",
        "guidance.scale",
    ]
    assert protocol.convention == "probe" and (drawing.rope, drawing.batch) == (None, None)
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
    from genfound.sampling.pipeline import Pipeline

    options = {"sizes": "data", "labels": "data", "n": 200}
    whole = evaluated(run, references, **options, out=str(tmp_path / "whole"))[0]
    draw, calls = Pipeline.__call__, []

    def failing(self: Pipeline, *arguments: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return draw(self, *arguments, **more)

    monkeypatch.setattr(Pipeline, "__call__", failing)
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
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "work").rglob("*.np[yz]")}
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
        ([16, 16], {"name": "heun", "steps": 2, "shift": 1.0, "guidance_at": "step"}, 4.0),
        ([12, 12], {"name": "heun", "steps": 3, "shift": 1.0, "guidance_at": "step"}, 4.0),
    ]
    with pytest.raises(ValueError, match="protocol=adm_50k has no row for 12x16; add one to table"):
        evaluated(run, references, **options, sizes=[12, 16])


def test_adms_own_file_gives_its_statistics_for_the_distances_and_its_images_for_the_shares(
    run: Path, references: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("genfound.evaluation.references.Inception", lambda *_: Averages())
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
    request = EvaluationRequest(config, ["protocol=nit"], "nit")
    run = composed("model=nit_xl", "data=imagenet_native", "data.root=x")
    found = {}
    for row in config["table"]:
        how = request.sampling_config(run, tuple(row["size"]))
        build.objective(how)
        check_size(tuple(row["size"]), 32)
        assert how["sample"]["uint8"] == "truncate" and how["guidance"]["channels"] == "all"
        found[tuple(row["size"])] = (how["sampler"]["name"], how["sampler"]["steps"], how["guidance"]["scale"])
    assert len(found) == 12
    assert found[256, 256] == ("sde", 250, 2.25) and found[320, 960] == ("euler", 50, 4.0)
    assert request.sampling_config(run, (512, 512))["guidance"]["interval"] == [0, 0.7]


@pytest.mark.parametrize("name", sorted(file.stem for file in (Path(config_dir()) / "protocol").glob("*.yaml")))
def test_named_protocols_set_known_keys_only(name: str) -> None:
    everything = composed("protocol=adm_50k", "from=x", "reference=y", name="evaluate")
    named = composed(f"protocol={name}", "from=x", "reference=y", name="evaluate")
    assert named.keys() == everything.keys()


def test_what_was_kept_of_another_number_of_images_is_not_taken(run: Path, references: Path, tmp_path: Path) -> None:
    folder = save_pngs(tmp_path / "given", Pictures([(16, 16)] * 100))
    options = {"extractor_weights": probe(references), "reference": of_probe(references)}
    alone = {n: evaluated(folder, references, n=n, out=str(tmp_path / f"{n}"), **options)[0] for n in (70, 100)}
    assert alone[70].figures != alone[100].figures
    for n in (100, 70, 100):
        kept = evaluated(folder, references, n=n, keep=True, out=str(tmp_path / "kept"), **options)[0]
        assert kept.figures == alone[n].figures and kept.protocol.count == n


def test_a_run_that_trains_on_is_measured_as_it_was(
    run: Path, references: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, prepare = tmp_path / "run", evaluator.prepare_reference
    shutil.copytree(run, copy)
    state = checkpoint_io.read(copy / "checkpoints/step-00000003.ckpt")
    moved = {"0.9": {name: tensor + 0.1 for name, tensor in state["ema"]["0.9"].items()}}
    later = {**state, "ema": moved, "global_step": 9}

    def found(out: str, meanwhile: Callable[[], object]) -> tuple[Any, Any]:
        monkeypatch.setattr(evaluator, "prepare_reference", lambda *arguments: (meanwhile(), prepare(*arguments))[1])
        result = evaluated(copy, references, sizes=[16, 16], out=str(tmp_path / out))[0]
        return result.figures, result.subject

    expected = found("undisturbed", lambda: None)
    assert found("newer", lambda: checkpoint_io.save(later, copy / "checkpoints/step-00000009.ckpt")) == expected
    (copy / "checkpoints/step-00000009.ckpt").unlink()
    assert found("removed", lambda: shutil.rmtree(copy)) == expected


def test_whatever_was_set_otherwise_is_listed(run: Path, references: Path, tmp_path: Path) -> None:
    rows = [{"size": [16, 16], "sampler": {"name": "euler", "steps": 2}, "guidance": {"name": "none"}}]
    options = {"reference_images": 90, "uint8": "truncate", "table": rows, "out": str(tmp_path)}
    result = evaluated(run, references, "sampler.steps=3", **options)[0]
    altered = ["n", "uint8", "extractor", "reference_view", "reference_images", "table", "sampler.steps"]
    assert result.protocol.altered == altered


def test_the_weaker_network_and_the_positions_are_in_the_protocol(
    run: Path, references: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn_by: list[Any] = []
    draw = SampleStore.draw
    monkeypatch.setattr(SampleStore, "draw", lambda self, *rest: (drawn_by.append(self.net), draw(self, *rest))[1])
    weak = tmp_path / "weak"
    shutil.copytree(run, weak)
    options = {"sizes": [16, 16], "out": str(tmp_path / "out")}
    guided = ["guidance=autoguidance", f"guidance.weights={weak}"]
    auto = evaluated(run, references, *guided, **options)[0]
    guidance = auto.protocol.drawing.guidance
    assert isinstance(guidance, dict) and len(guidance["hash"]) == 16
    assert guidance["weights"] == str(weak / "checkpoints/step-00000003.ckpt")
    moved = weak.rename(tmp_path / "moved")
    again = evaluated(run, references, guided[0], f"guidance.weights={moved}", **options)[0]
    assert differences(auto.protocol, again.protocol) == [] and again.figures == auto.figures
    rope = {"rule": "ntk-aware", "trained": 4, "target": None, "decouple": None}
    plain, turned = (evaluated(run, references, **options, **more)[0] for more in ({}, {"rope": rope}))
    assert turned.protocol.drawing.rope == {"rule": "ntk-aware", "trained": 4}
    assert [net.rope.rule for net in drawn_by] == ["normal"] * 3 + ["ntk-aware"]
    assert differences(plain.protocol, turned.protocol) == ["drawing.rope.rule", "drawing.rope.trained"]


def test_references_of_the_same_images_at_two_places_are_the_same(run: Path, references: Path, tmp_path: Path) -> None:
    options = {"sizes": [16, 16], "reference_view": "crop", "extractor_weights": probe(references)}
    results = []
    for name in ("a", "b"):
        folder = save_pngs(tmp_path / name, Pictures([(16, 16)] * 80))
        more = {"reference": str(folder), "out": str(tmp_path / f"out_{name}")}
        results += evaluated(run, references, **options, **more)
    assert differences(results[0].protocol, results[1].protocol) == []
    assert results[0].protocol.reference["from"] != results[1].protocol.reference["from"]


def sorted_and_renamed(folder: Path, pictures: Pictures) -> tuple[Path, Path]:
    """The same files under two sets of names: sorted by class, and in no order."""
    given = save_pngs(folder / "files", pictures)
    by_class, renamed = folder / "by_class", folder / "renamed"
    draw = np.random.default_rng(0).permutation(len(pictures))
    for number, label in enumerate(pictures.labels):
        for target in (by_class / f"{label}" / f"{number:04d}.png", renamed / f"{draw[number]:04d}.png"):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(given / f"{number:04d}.png", target)
    return by_class, renamed


@pytest.mark.parametrize("convention", ["adm", "torch_fidelity"])
def test_the_names_of_files_change_no_figure(
    convention: str, run: Path, references: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("genfound.evaluation.references.Inception", lambda *_: Averages())
    monkeypatch.setattr("genfound.metrics.compute.SPLIT", 30)
    monkeypatch.setattr("genfound.metrics.compute.SUBSET", 20)
    samples = sorted_and_renamed(tmp_path / "s", Pictures([(8, 8)] * 120, seed=1))
    reals = sorted_and_renamed(tmp_path / "r", Pictures([(8, 8)] * 90, seed=2))
    options = {"extractor": "inception", "convention": convention, "reference_images": 70, "n": 100}
    results = [
        evaluated(sample, references, **options, reference=str(real), out=str(tmp_path / "out"))[0]
        for sample, real in zip(samples, reals, strict=True)
    ]
    assert len(results[0].figures) >= 5 and results[0].figures == results[1].figures
    assert differences(results[0].protocol, results[1].protocol) == ["drawing (unknown)"]
    assert results[0].subject["hash"] == results[1].subject["hash"]
    assert results[0].protocol.order == "by content"


def test_a_probes_figures_follow_no_names_either(run: Path, references: Path, tmp_path: Path) -> None:
    pictures = Pictures([(16, 16)] * 100)
    folders = sorted_and_renamed(tmp_path, pictures)
    numbers = {image.tobytes(): label for image, label in zip(pictures.images, pictures.labels, strict=True)}
    options = {"extractor_weights": probe(references), "reference": of_probe(references), "n": 80}
    results = []
    for folder in folders:
        images = open_images(folder)
        labels = [numbers[images[k].tobytes()] for k in range(len(images))]
        (folder / "labels.txt").write_text("".join(f"{label}\n" for label in labels))
        results += evaluated(folder, references, **options, out=str(tmp_path / "out"))
    assert results[0].figures == results[1].figures and "accuracy_probe" in results[0].figures


def test_what_is_ignored_is_printed_and_recorded(
    run: Path, references: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [save_pngs(tmp_path / name, Pictures([(16, 16)] * 80, seed)) for seed, name in enumerate("ab")]
    for folder in folders:
        (folder / "notes.txt").write_text("no image")
    options = {"extractor_weights": probe(references), "reference": str(folders[1]), "out": str(tmp_path / "out")}
    result = evaluated(folders[0], references, **options)[0]
    assert result.subject["ignored"] == result.protocol.reference["ignored"] == "1 .txt"
    assert capsys.readouterr().out.count("ignored 1 .txt") == 2


def test_samples_belong_to_one_evaluation_at_a_time(run: Path, references: Path, tmp_path: Path) -> None:
    options = {"sizes": [16, 16], "out": str(tmp_path)}
    evaluated(run, references, keep=True, **options)
    work = next((tmp_path / "work").iterdir())
    with lock(work), pytest.raises(ValueError, match=r"another process .* is at work on .*; wait for it, or give out="):
        evaluated(run, references, **options)
