"""Data that people already have, from the command line: tars, parquet files and latents of REPA."""

from pathlib import Path

import pytest

from tests.cli.commands import TINY, genfound, one_error
from tests.data.images.test_archives import parquet, picture, tar, webdataset
from tests.data.latents.test_published import write_repa

PIXELS = ["tokenizer=pixel", "data.size=16", "data.num_workers=0"]
STEP = [*TINY, "trainer.max_steps=1", "data.num_workers=0"]


def test_tars_are_encoded_and_trained_on(tmp_path: Path) -> None:
    webdataset(tmp_path / "tars")
    done = genfound("encode", "data=image_tars", "data.root=tars", *PIXELS, "patch_size=2", "out=store", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    of_store = ["data=latent_store", "data.root=store", "tokenizer=pixel", "name=a"]
    trained = genfound("train", *of_store, *STEP, cwd=tmp_path)
    assert trained.returncode == 0 and "3 classes" in trained.stdout, trained.stderr
    trained = genfound("train", "data=image_tars", "data.root=tars", "tokenizer=pixel", "name=b", *STEP, cwd=tmp_path)
    assert trained.returncode == 0 and "tars: 5 images of 3 classes" in trained.stdout, trained.stderr


def test_parquet_files_are_encoded(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    parquet(tmp_path / "hf/data/train-00000-of-00001.parquet", list(range(12)), [0, 1] * 6, ["cat", "dog"])
    done = genfound("encode", "data=image_parquet", "data.root=hf", *PIXELS, "patch_size=2", "out=store", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    sampled = ["data=latent_store", "data.root=store", "tokenizer=pixel", "name=a"]
    assert "2 classes" in genfound("train", *sampled, *STEP, cwd=tmp_path).stdout


def test_latents_of_repa_are_trained_on(tmp_path: Path) -> None:
    write_repa(tmp_path / "repa")
    chosen = ["model=sit_tiny", "data=repa_latents", "data.root=repa", "tokenizer=sd_vae"]
    chosen += ["tokenizer.weights=random_tiny", "data.batch_size=2", "batch.images=4"]
    kept = [word for word in STEP if not word.startswith(("batch.packs", "data.max_tokens"))]
    trained = genfound("train", *chosen, "data.size=32", "name=a", *kept, cwd=tmp_path)
    assert trained.returncode == 0 and "4 latents of REPA in 4 classes" in trained.stdout, trained.stderr
    assert "data.size=32" in one_error(genfound("train", *chosen, "name=b", *kept, cwd=tmp_path))
    chosen += ["data.size=32", "name=c"]
    assert "data.flip=false" in one_error(genfound("train", *chosen, "data.flip=true", *kept, cwd=tmp_path))


WRONG = {
    "data=image_tars data.root=nowhere": "data.root=nowhere is not a folder",
    "data=image_tars data.root=empty": "data.root=empty holds no *.tar",
    "data=image_parquet data.root=empty": "data.root=empty holds no *.parquet",
    "data=image_tars data.root=other": "no.tar is no tar, is compressed, or is damaged",
    "data=repa_latents data.root=empty": "data.root=empty has no dataset.json",
}


@pytest.mark.parametrize("arguments", WRONG)
def test_wrong_input_is_one_line(arguments: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    tar(tmp_path / "other/no.tar", {"a/b.png": picture(0)}).write_bytes(b"no tar" * 200)
    small = ["tokenizer=sd_vae", "tokenizer.weights=random_tiny", "name=a"]
    assert WRONG[arguments] in one_error(genfound("train", *arguments.split(), *small, cwd=tmp_path))
