"""Training on one's own folder of photographs, from the command line."""

from pathlib import Path

import numpy as np
from PIL import Image

from tests.cli.commands import TINY, genfound, one_error

CLASSES = ("boats", "forests", "houses", "skies")


def photographs(root: Path, count: int = 40) -> None:
    """Photograph-like files of mixed sizes and formats, one of them cut short."""
    draw = np.random.default_rng(0)
    for i in range(count):
        height, width = draw.integers(40, 160, 2)
        coarse = draw.integers(0, 256, (5, 7, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((int(width), int(height)), Image.Resampling.BICUBIC)
        folder = root / CLASSES[i % len(CLASSES)]
        folder.mkdir(parents=True, exist_ok=True)
        picture.save(folder / (f"{i:03d}.png" if i % 5 == 0 else f"{i:03d}.jpg"))
    broken = root / CLASSES[0] / "broken.jpg"
    whole = (root / CLASSES[1] / "001.jpg").read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])


def test_a_folder_trains_previews_and_samples_at_its_own_sizes(tmp_path: Path) -> None:
    photographs(tmp_path / "photos")
    small = [
        "data=image_folder",
        "data.root=photos",
        "data.max_image_tokens=64",
        "data.num_workers=1",
        "callbacks.preview.every=8",
    ]
    result = genfound("train", *TINY, *small, "data.max_tokens=256", "trainer.max_steps=3", "name=run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "40 images of 4 classes" in result.stdout
    assert "1 skipped" in result.stdout and "broken.jpg" in result.stdout
    assert "reduced to 64 tokens" in result.stdout
    assert any((tmp_path / "runs/default/run/samples").glob("*.png"))
    sampled = genfound("sample", "from=runs/default/run", "labels=[skies]", "batch=1", "out=out", cwd=tmp_path)
    assert sampled.returncode == 0, sampled.stderr
    sizes = {Image.open(file).size for file in (tmp_path / "out").glob("*_skies_*.png")}
    assert len(sizes) > 1 and any(width > height for width, height in sizes)


def test_another_folder_is_not_the_same_run(tmp_path: Path) -> None:
    for name, count in (("one", 8), ("two", 12)):
        photographs(tmp_path / name, count)
    same = [*TINY, "data=image_folder", "data.max_image_tokens=64", "name=run", "data.num_workers=0"]
    assert genfound("train", *same, "data.root=one", "trainer.max_steps=1", cwd=tmp_path).returncode == 0
    error = one_error(genfound("train", *same, "data.root=two", "trainer.max_steps=2", cwd=tmp_path))
    assert "these are not the images that runs/default/run was trained on" in error


def test_wrong_folders_are_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text/class").mkdir(parents=True)
    (tmp_path / "text/class/note.jpg").write_text("not an image")
    expected = {"nowhere": "is not a folder", "empty": "has no class folders", "text": "none of 1 files can be read"}
    for root, message in expected.items():
        result = genfound("train", *TINY, "data=image_folder", f"data.root={root}", cwd=tmp_path)
        assert message in one_error(result)
