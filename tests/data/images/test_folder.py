from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from genfound.data.images import folder as folder_module
from genfound.data.images.folder import ORIENTATION, ImageFolder, open_rgb
from genfound.data.images.views import center_crop, resize
from tests.helpers import with_views

RED, WHITE = (200, 30, 30), (255, 255, 255)


def folder(root: Path, **options: Any) -> ImageFolder:
    defaults: dict[str, Any] = {
        "holdout": None, "view": "native", "size": 16, "max_tokens": 64, "max_image_tokens": None,
        "unit": 8, "max_pixels": None, "split": "train", "index": str(root.parent / "index"),
    }  # fmt: skip
    return ImageFolder(root=str(root), **with_views({**defaults, **options}))


def plain(path: Path, height: int = 32, width: int = 40, colour: tuple[int, int, int] = RED) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), colour).save(path)
    return path


def write_odd_files(root: Path) -> None:
    """One of each kind of file that people have."""
    odd = root / "odd"
    plain(odd / "plain.jpg")
    Image.new("RGB", (40, 32), RED).save(odd / "png.jpeg", format="PNG")
    Image.new("CMYK", (40, 32), (0, 255, 255, 0)).save(odd / "cmyk.jpg")
    Image.new("L", (40, 32), 77).save(odd / "grey.png")
    palette = Image.new("P", (40, 32), 0)
    palette.putpalette([0, 0, 255, *RED])
    palette.paste(1, (0, 0, 20, 32))
    palette.save(odd / "palette.png", transparency=0)
    Image.fromarray(np.full((32, 40), 200 * 257, dtype=np.uint16)).save(odd / "sixteen.png")
    frames = [Image.new("RGB", (40, 32), colour) for colour in (RED, WHITE)]
    frames[0].save(odd / "animated.gif", save_all=True, append_images=frames[1:])
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    Image.new("RGB", (40, 24), RED).save(odd / "turned.jpg", exif=exif)
    Image.new("RGB", (1, 1), RED).save(odd / "pixel.png")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(odd / "cut.jpg")
    (odd / "cut.jpg").write_bytes((odd / "cut.jpg").read_bytes()[:1500])
    (odd / "empty.png").touch()
    (odd / "notes.txt").write_text("not an image")
    (odd / ".hidden.png").write_bytes((odd / "grey.png").read_bytes())


def test_an_image_can_be_seen_at_another_size(tmp_path: Path) -> None:
    """From the file, not from what is shown of it."""
    noise = np.random.default_rng(0).integers(0, 256, (48, 40, 3), dtype=np.uint8)
    (tmp_path / "images/a").mkdir(parents=True)
    Image.fromarray(noise).save(tmp_path / "images/a/0.png")
    source = folder(tmp_path / "images")
    half = resize(Image.fromarray(noise), 24, 20, Image.Resampling.BICUBIC)
    for found, wanted in zip(source.rendered(0, [(48, 40), (24, 20)]), (source.image(0), np.array(half)), strict=True):
        assert np.array_equal(found, wanted)
    square = folder(tmp_path / "images", view="square", size=32)
    assert np.array_equal(square.rendered(0, [(16, 16)])[0], np.array(center_crop(Image.fromarray(noise), 16)))


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    write_odd_files(root)
    return root


KEPT = ["animated.gif", "cmyk.jpg", "grey.png", "palette.png", "pixel.png", "plain.jpg", "png.jpeg", "sixteen.png",
        "turned.jpg"]  # fmt: skip


def test_readable_files_are_kept_and_all_become_rgb(odd: Path) -> None:
    source = folder(odd)
    assert source.files == [f"odd/{name}" for name in KEPT]
    assert source.class_names == ["odd"]
    assert source.labels.tolist() == [0] * len(KEPT)
    for i, size in enumerate(source.sizes.tolist()):
        image = source.image(i)
        assert image.dtype == np.uint8
        assert image.shape == (*size, 3)


def test_the_report_says_what_was_skipped_and_converted(odd: Path) -> None:
    report = "\n".join(folder(odd).report())
    assert "9 images of 1 classes" in report
    assert "3 skipped" in report
    assert "empty.png: the file is empty" in report
    assert "cut.jpg: image file is truncated" in report
    assert "notes.txt: " in report
    assert ".hidden" not in report
    for note in (
        "1 converted from CMYK to RGB",
        "1 converted from L to RGB",
        "2 converted from P to RGB",  # the palette and the animation
        "1 converted from I;16 to RGB",
        "1 rotated upright",
        "1 animated, of which the first frame is used",
        "1 of format PNG with the suffix .jpeg",
    ):
        assert note in report, note
    assert "reduced" not in report


@pytest.mark.parametrize(
    ("name", "colour", "tolerance"),
    [
        ("plain.jpg", RED, 3), ("png.jpeg", RED, 0), ("cmyk.jpg", (255, 0, 0), 3), ("grey.png", (77, 77, 77), 0),
        ("sixteen.png", (200, 200, 200), 0), ("animated.gif", RED, 0), ("pixel.png", RED, 0), ("turned.jpg", RED, 3),
    ],
)  # fmt: skip
def test_colours_survive_the_conversion(odd: Path, name: str, colour: tuple[int, int, int], tolerance: int) -> None:
    source = folder(odd)
    pixels = source.image(source.files.index(f"odd/{name}")).astype(int)
    assert np.abs(pixels - np.array(colour)).max() <= tolerance


def test_transparency_is_laid_on_white(odd: Path) -> None:
    pixels = np.asarray(open_rgb(odd / "odd/palette.png"))
    assert (pixels[:, :20] == RED).all()
    assert (pixels[:, 20:] == WHITE).all()
    half = Image.new("RGBA", (8, 8), (0, 0, 0, 128))
    half.save(odd / "odd/half.png")
    assert np.abs(np.asarray(open_rgb(odd / "odd/half.png")).astype(int) - 127).max() <= 1


def test_exif_rotation_is_applied_and_counts_in_the_size(odd: Path) -> None:
    source = folder(odd)
    assert open_rgb(odd / "odd/turned.jpg").size == (24, 40)
    assert source.sizes[source.files.index("odd/turned.jpg")].tolist() == [40, 24]


def test_a_single_pixel_becomes_one_token(odd: Path) -> None:
    source = folder(odd)
    assert source.sizes[source.files.index("odd/pixel.png")].tolist() == [8, 8]


def test_hidden_folders_are_not_looked_into(tmp_path: Path) -> None:
    root = tmp_path / "images"
    plain(root / "cats/a.png")
    plain(root / "cats/.thumbnails/a.png")
    plain(root / ".trash/b.png")
    source = folder(root)
    assert source.class_names == ["cats"]
    assert source.files == ["cats/a.png"]


def test_what_systems_leave_beside_files_is_left_out(tmp_path: Path) -> None:
    root = tmp_path / "images"
    plain(root / "cats/a.png")
    plain(root / "cats/__MACOSX/._a.png")
    for name in ("cats/._a.png", "cats/Thumbs.db", "cats/.DS_Store", "cats/desktop.ini", "._cats", "Thumbs.db"):
        (root / name).write_bytes(b"\0\5\26\7")
    source = folder(root)
    assert source.class_names == ["cats"] and source.files == ["cats/a.png"]
    assert len(source.report()) == 1


def test_files_above_the_limit_of_pixels_are_skipped_and_the_limit_is_named(tmp_path: Path) -> None:
    root = tmp_path / "images"
    plain(root / "cats/a.png")
    plain(root / "cats/b.png", 48, 40)
    assert folder(root).files == folder(root, max_pixels=48 * 40).files == ["cats/a.png", "cats/b.png"]
    source = folder(root, max_pixels=32 * 40)
    assert source.files == ["cats/a.png"] and source.image(0).shape == (32, 40, 3)
    assert "b.png: its 48 x 40 pixels are more than data.max_pixels=1280" in source.report()[-1]
    with pytest.raises(ValueError, match=r"data\.max_pixels=0 must be a whole number of at least 1, or null"):
        folder(root, max_pixels=0)


def test_wide_values_that_do_not_tell_what_is_white_are_skipped_and_named(tmp_path: Path) -> None:
    root = plain(tmp_path / "images/cats/a.png").parents[1]
    Image.fromarray(np.full((32, 40), 4.0, dtype=np.float32)).save(root / "cats/b.tif")
    Image.fromarray(np.full((32, 40), 1.0, dtype=np.float32)).save(root / "cats/c.tif")
    source = folder(root)
    assert source.files == ["cats/a.png", "cats/c.tif"] and (source.image(1) == 255).all()
    assert "b.tif: its values, 4 to 4 in mode F, do not tell what is white; convert it" in source.report()[-1]
    assert "  1 converted from F to RGB" in source.report()


def test_that_none_is_held_out_is_said(tmp_path: Path) -> None:
    root = tmp_path / "images"
    for name in ("cats/a.png", "cats/b.png", "dogs/a.png"):
        plain(root / name)
    said = "  none held out for validation: no class has data.holdout=3 images"
    assert said in folder(root, holdout=3).report()
    assert len(folder(root, holdout=3, split="val").files) == 0
    plain(root / "cats/c.png")
    for source in (folder(root, holdout=3), folder(root, holdout=None)):
        assert not any("held out" in line for line in source.report())


def test_classes_are_sorted_and_files_may_lie_deeper(tmp_path: Path) -> None:
    root = tmp_path / "images"
    for name in ("dogs/b.png", "cats/deep/er/a.png", "cats/z.png"):
        plain(root / name)
    source = folder(root)
    assert source.class_names == ["cats", "dogs"]
    assert source.files == ["cats/deep/er/a.png", "cats/z.png", "dogs/b.png"]
    assert source.labels.tolist() == [0, 0, 1]


def test_every_nth_image_of_each_class_is_held_out(tmp_path: Path) -> None:
    root = tmp_path / "images"
    for name, count in (("cats", 10), ("dogs", 7), ("owls", 2)):
        for i in range(count):
            plain(root / name / f"{i:02d}.png")
    train, val = folder(root, holdout=3), folder(root, holdout=3, split="val")
    assert val.files == ["cats/02.png", "cats/05.png", "cats/08.png", "dogs/02.png", "dogs/05.png"]
    assert set(train.files).isdisjoint(val.files)
    assert sorted(train.files + val.files) == folder(root).files
    assert train.fingerprint == val.fingerprint
    assert val.class_names == train.class_names
    assert len(folder(root, split="val").files) == 0


class Counted:
    """Remembers which files were decoded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.files: list[str] = []
        decode = folder_module.open_rgb

        def counting(file: Path, max_pixels: int | None) -> Image.Image:
            self.files.append(file.name)
            return decode(file, max_pixels)

        monkeypatch.setattr(folder_module, "open_rgb", counting)

    def take(self) -> list[str]:
        taken, self.files = sorted(self.files), []
        return taken


def test_the_index_is_reused_and_refreshed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "images"
    for name in "abc":
        plain(root / f"cats/{name}.png")
    decoded = Counted(monkeypatch)
    first = folder(root)
    assert decoded.take() == ["a.png", "b.png", "c.png"]
    assert folder(root).fingerprint == first.fingerprint
    assert decoded.take() == []
    stamp = (root / "cats/a.png").stat().st_mtime_ns
    plain(root / "cats/a.png", height=64)
    os.utime(root / "cats/a.png", ns=(stamp + 10**9, stamp + 10**9))
    plain(root / "cats/d.png")
    (root / "cats/b.png").unlink()
    changed = folder(root)
    assert decoded.take() == ["a.png", "d.png"]
    assert changed.files == ["cats/a.png", "cats/c.png", "cats/d.png"]
    assert changed.sizes[0].tolist() == [64, 40]
    assert changed.fingerprint != first.fingerprint


def test_an_unreadable_file_is_remembered_and_may_be_mended(odd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = folder(odd)
    decoded = Counted(monkeypatch)
    plain(odd / "odd/empty.png")
    after = folder(odd)
    assert decoded.take() == ["empty.png"]
    assert set(after.files) - set(before.files) == {"odd/empty.png"}


def test_folders_do_not_share_an_index(tmp_path: Path) -> None:
    plain(tmp_path / "one/cats/a.png", height=32)
    plain(tmp_path / "two/cats/a.png", height=64)
    sizes = [folder(tmp_path / name, index=str(tmp_path / "index")).sizes.tolist() for name in ("one", "two", "one")]
    assert sizes == [[[32, 40]], [[64, 40]], [[32, 40]]]
    assert len(list((tmp_path / "index").iterdir())) == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, r"data\.root=.* is not a folder"),
        (lambda root: root.touch(), r"data\.root=.* is not a folder"),
        (lambda root: plain(root / "a.png"), r"data\.root=.* has no class folders; put the images into .*/<class>/"),
        (lambda root: plain(root / "__MACOSX/a.png"), r"data\.root=.* has no class folders; put the images into"),
        (lambda root: (root / "cats").mkdir(parents=True), r"data\.root=.*: none of 0 files can be read"),
    ],
    ids=["missing", "a file", "no classes", "litter", "nothing inside"],
)
def test_a_wrong_root_is_named(tmp_path: Path, make: Any, message: str) -> None:
    make(tmp_path / "images")
    with pytest.raises(FileNotFoundError, match=message):
        folder(tmp_path / "images")


def test_a_folder_without_a_single_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "images/cats").mkdir(parents=True)
    for name in ("a.png", "b.jpg"):
        (tmp_path / "images/cats" / name).write_text("no")
    with pytest.raises(FileNotFoundError, match=r"data\.root=.*: none of 2 files can be read as an image"):
        folder(tmp_path / "images")


def test_large_images_are_reduced(tmp_path: Path) -> None:
    root = tmp_path / "images"
    plain(root / "cats/large.png", 160, 240)
    plain(root / "cats/small.png", 32, 40)
    source = folder(root, max_tokens=1000, max_image_tokens=64)
    assert source.sizes.tolist() == [[48, 72], [32, 40]]
    assert source.image(0).shape == (48, 72, 3)
    assert any("1 reduced to 64 tokens" in line for line in source.report())
    assert folder(root, max_tokens=1000).sizes.tolist() == [[160, 240], [32, 40]]
    assert folder(root, max_tokens=64, max_image_tokens=999).sizes.tolist() == [[48, 72], [32, 40]]


def test_the_square_view_is_the_centre_crop(tmp_path: Path) -> None:
    root = tmp_path / "images"
    plain(root / "cats/a.png", 50, 90)
    source = folder(root, view="square", size=24)
    assert source.sizes.tolist() == [[24, 24]]
    assert source.image(0).shape == (24, 24, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"view": "round"}, r"data\.view=round is unknown; choose native, square, squares, mixed or flexible"),
        ({"view": "square", "size": 20}, r"data\.size=20 must be a multiple of 8 pixels"),
        ({"holdout": 0}, r"data\.holdout=0 must be a whole number of at least 2"),
        ({"max_image_tokens": -5}, r"data\.max_image_tokens=-5 must be a whole number of at least 1"),
    ],
)
def test_wrong_options_are_named(odd: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        folder(odd, **options)


def test_a_file_that_vanishes_during_training_is_named(odd: Path) -> None:
    source = folder(odd)
    (odd / "odd/plain.jpg").unlink()
    with pytest.raises(ValueError, match=r"plain\.jpg could be read when training began and cannot now"):
        source.image(source.files.index("odd/plain.jpg"))
