from __future__ import annotations

import os
import shutil
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from genfound.data.images import imagenet, index
from genfound.data.images.folder import ORIENTATION, ImageFolder
from genfound.data.images.imagenet import TRIES, ImageTree, decode
from genfound.data.images.views import center_crop, resize
from tests.helpers import composed, with_views

RED = (200, 30, 30)
DEFAULTS: dict[str, Any] = {
    "holdout": None, "view": "native", "size": 16, "max_tokens": 64, "max_image_tokens": None, "check": "header",
    "max_pixels": None, "decode": "exact",
    "unit": 8, "split": "train",
}  # fmt: skip


def tree(root: Path, **options: Any) -> ImageTree:
    return ImageTree(root=str(root), index=str(root.parent / "index"), **with_views({**DEFAULTS, **options}))


def plain(path: Path, height: int = 32, width: int = 40, colour: tuple[int, int, int] = RED) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), colour).save(path)
    return path


def noisy(path: Path, height: int = 64, width: int = 64, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    return path


def cut(path: Path) -> Path:
    """Keep the header and lose the end."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def grey_of(source: ImageTree, index: int) -> int:
    return int(np.median(source.image(index)))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three classes of five flat pictures, whose grey is 20 x class + number."""
    for c, name in enumerate(("n01", "n02", "n03")):
        for i in range(5):
            plain(tmp_path / "images/train" / name / f"{name}_{i}.png", 32, 40 + 8 * i, (20 * c + i,) * 3)
    return tmp_path / "images"


def test_classes_are_the_sorted_folders_of_train(images: Path) -> None:
    source = tree(images)
    assert source.class_names == ["n01", "n02", "n03"]
    assert source.labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert source.files[:2] == ["n01/n01_0.png", "n01/n01_1.png"]
    assert source.sizes[:2].tolist() == [[32, 40], [32, 48]]
    assert [grey_of(source, i) for i in range(15)] == [20 * c + i for c in range(3) for i in range(5)]
    assert "15 images of 3 classes, 32 x 40 to 32 x 72 pixels" in source.report()[0]


def test_only_images_by_their_suffix_are_taken(images: Path) -> None:
    for name in ("a.JPEG", "b.jpg", "c.jpeg", "d.PNG", "e.webp"):
        plain(images / "train/n01" / name)
    for name in ("readme.txt", "x.gif", ".hidden.png"):
        shutil.copy(images / "train/n01/d.PNG", images / "train/n01" / name)
    (images / "train/notes.txt").write_text("")
    assert len(tree(images).files) == 20
    assert [f for f in tree(images).files if not f.startswith("n01/n01")][:5] == [
        f"n01/{name}" for name in ("a.JPEG", "b.jpg", "c.jpeg", "d.PNG", "e.webp")
    ]
    assert "  2 ignored because of their suffix: 1 .gif, 1 .txt" in tree(images).report()
    shutil.copy(images / "train/n01/d.PNG", images / "train/n02/picture")
    assert "  3 ignored because of their suffix: 1 without any, 1 .gif, 1 .txt" in tree(images).report()
    (images / "train/n02/picture").unlink()
    assert "  2 ignored because of their suffix: 1 .gif, 1 .txt" in tree(images).report()


def test_pixels_are_those_of_the_official_code(images: Path) -> None:
    odd = images / "train/n01"
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    Image.new("RGB", (40, 24), RED).save(odd / "turned.jpg", exif=exif)
    Image.new("CMYK", (40, 32), (0, 255, 255, 0)).save(odd / "cmyk.JPEG")
    Image.new("L", (40, 32), 77).save(odd / "grey.JPEG")
    Image.new("RGBA", (40, 32), (10, 20, 30, 0)).save(odd / "clear.png")
    Image.new("RGB", (40, 32), RED).save(odd / "png.JPEG", format="PNG")
    source = tree(images)
    for name in ("turned.jpg", "cmyk.JPEG", "grey.JPEG", "clear.png", "png.JPEG"):
        expected = np.asarray(Image.open(odd / name).convert("RGB"))
        place = source.files.index(f"n01/{name}")
        assert source.sizes[place].tolist() == list(expected.shape[:2])
        assert np.array_equal(source.image(place), expected)
    assert (np.asarray(decode(odd / "clear.png")) == (10, 20, 30)).all()
    report = "\n".join(source.report())
    for note in ("1 converted from CMYK to RGB", "1 converted from L to RGB", "1 of format PNG with the suffix .JPEG"):
        assert note in report
    assert "rotated" not in report


def test_the_native_view_rounds_down_and_reduces(tmp_path: Path) -> None:
    file = noisy(tmp_path / "images/train/a/a.png", 61, 99)
    noisy(tmp_path / "images/train/a/b.png", 160, 240)
    source = tree(tmp_path / "images", max_tokens=1000, max_image_tokens=100)
    assert source.sizes.tolist() == [[56, 96], [64, 96]]
    expected = resize(Image.open(file), 56, 96, Image.Resampling.BICUBIC)
    assert np.array_equal(source.image(0), np.asarray(expected))
    assert any("1 reduced to 100 tokens" in line for line in source.report())


def test_the_square_view_is_the_centre_crop(tmp_path: Path) -> None:
    file = noisy(tmp_path / "images/train/a/a.png", 61, 99)
    source = tree(tmp_path / "images", view="square", size=24)
    assert source.sizes.tolist() == [[24, 24]]
    assert np.array_equal(source.image(0), np.asarray(center_crop(Image.open(file), 24)))


def test_mixed_images_are_shown_in_three_ways(tmp_path: Path) -> None:
    file = noisy(tmp_path / "images/train/a/a.png", 61, 99)
    noisy(tmp_path / "images/train/b/b.png", 40, 30)
    source = tree(tmp_path / "images", view="mixed", size=24, max_tokens=1000)
    assert source.sizes.tolist() == [[56, 96], [40, 24], *[[24, 24]] * 2, *[[48, 48]] * 2]
    assert source.labels.tolist() == [0, 1] * 3
    assert source.files == ["a/a.png", "b/b.png"]
    assert np.array_equal(source.image(4), np.asarray(center_crop(Image.open(file), 48)))
    assert any("6 shown in a pass, as native and 24 and 48" in line for line in source.report())


def test_flexible_images_are_cropped_half_of_the_times_if_they_are_large(tmp_path: Path) -> None:
    large = noisy(tmp_path / "images/train/a/a.png", 61, 99)
    small = noisy(tmp_path / "images/train/a/b.png", 40, 32)
    noisy(tmp_path / "images/train/a/c.png", 16, 16)
    source = tree(tmp_path / "images", view="flexible", size=48)
    assert source.sizes.tolist() == [[32, 56], [40, 32], [48, 48], [40, 32]]
    expected = resize(Image.open(large), 32, 56, Image.Resampling.BICUBIC)
    assert np.array_equal(source.image(0), np.asarray(expected))
    assert np.array_equal(source.image(2), np.asarray(center_crop(Image.open(large), 48)))
    assert np.array_equal(source.image(3), np.asarray(Image.open(small)))
    report = "\n".join(source.report())
    assert "1 left out, they have too few tokens" in report
    assert "4 shown in a pass, as resized-48 and 48" in report


def test_val_validates_where_there_is_one(images: Path) -> None:
    plain(images / "val/n01/v.png")
    plain(images / "val/n03/w.png")
    train, val = tree(images, holdout=2), tree(images, holdout=2, split="val")
    assert len(train.files) == 15
    assert val.files == ["n01/v.png", "n03/w.png"]
    assert val.labels.tolist() == [0, 2]
    assert val.class_names == train.class_names
    assert val.image(1).shape == (32, 40, 3)


@pytest.mark.parametrize("flat", [False, True])
def test_without_class_folders_in_val_every_nth_image_validates(images: Path, flat: bool) -> None:
    if flat:
        plain(images / "val/ILSVRC2012_val_1.JPEG")
    train, val = tree(images, holdout=2), tree(images, holdout=2, split="val")
    assert val.files == [f"{name}/{name}_{i}.png" for name in ("n01", "n02", "n03") for i in (1, 3)]
    assert sorted(train.files + val.files) == tree(images).files
    assert train.fingerprint == val.fingerprint
    assert tree(images, split="val").files == []


def test_a_class_that_only_val_has_is_refused(images: Path) -> None:
    plain(images / "val/n09/v.png")
    with pytest.raises(ValueError, match=r"val has 1 class folders that .*train has not, such as n09"):
        tree(images)


def test_headers_are_read_once_and_pixels_not_at_all(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []
    examine = imagenet._examine
    monkeypatch.setattr(imagenet, "_examine", lambda f, **how: (looked.append(f.name), examine(f, **how))[1])
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("pixels were decoded"))
    first = tree(images)
    assert len(looked) == 15
    assert tree(images).fingerprint == first.fingerprint
    assert len(looked) == 15
    shutil.copy(images / "train/n01/n01_4.png", images / "train/n01/n01_0.png")
    second = tree(images)
    assert looked[15:] == ["n01_0.png"]
    assert second.sizes[0].tolist() == [32, 72]
    assert second.fingerprint != first.fingerprint


def test_empty_files_and_wrong_headers_are_skipped_and_named(images: Path) -> None:
    (images / "train/n01/empty.JPEG").touch()
    (images / "train/n01/text.JPEG").write_text("not an image")
    source = tree(images)
    assert len(source.files) == 15
    report = "\n".join(source.report())
    assert "2 skipped" in report
    assert "empty.JPEG: the file is empty" in report
    assert "text.JPEG: cannot identify image file" in report


def test_a_full_check_finds_what_the_header_hides(images: Path) -> None:
    cut(noisy(images / "train/n01/cut.jpg"))
    assert "n01/cut.jpg" in tree(images).files
    full = tree(images, check="full")
    assert "n01/cut.jpg" not in full.files
    assert any("cut.jpg: " in line and "truncated" in line for line in full.report())
    assert "n01/cut.jpg" in tree(images).files


def test_a_file_that_cannot_be_decoded_is_replaced_within_its_class(
    images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut(noisy(images / "train/n02/n02_2.png", 32, 96))
    source = tree(images)
    place = source.files.index("n02/n02_2.png")
    assert source.sizes[place].tolist() == [32, 96]
    image = source.image(place)
    assert image.shape == (32, 96, 3)
    assert int(np.median(image)) == 23  # the next file's picture at the planned size
    assert np.array_equal(image, source.image(place))
    assert np.array_equal(image, tree(images).image(place))
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1
    assert "n02_2.png cannot be read, an image of its class takes its place: " in warnings[0]
    assert any("1 replaced by others of their class" in line for line in tree(images).report())


def test_the_last_file_of_a_class_is_replaced_by_its_first(images: Path) -> None:
    source = tree(images)
    (images / "train/n02/n02_4.png").unlink()
    assert grey_of(source, 9) == 20
    assert source.image(9).shape == (32, 72, 3)


def test_neighbours_that_fail_too_are_passed_over(images: Path) -> None:
    source = tree(images)
    for i in (1, 2, 3):
        (images / f"train/n03/n03_{i}.png").write_text("gone")
    assert grey_of(source, 11) == 44


def test_a_mended_file_is_no_longer_counted(images: Path) -> None:
    file = noisy(images / "train/n01/z.png")
    whole = file.read_bytes()
    cut(file)
    tree(images).image(5)
    assert any("replaced" in line for line in tree(images).report())
    file.write_bytes(whole)
    assert not any("replaced" in line for line in tree(images).report())


def test_processes_report_a_file_once_between_them(images: Path, capfd: pytest.CaptureFixture[str]) -> None:
    noisy(images / "train/n01/z.png")
    cut(images / "train/n01/z.png")

    def look_twice(source: ImageTree) -> None:
        for _ in range(2):
            source.image(5)

    for _ in range(2):
        source = tree(images)
        process = get_context("fork").Process(target=look_twice, args=(source,))
        process.start()
        process.join()
        assert process.exitcode == 0
        assert not source.stand_ins  # that was another process
    assert capfd.readouterr().err.count("warning: ") == 1


def test_a_missing_disk_is_not_papered_over(tmp_path: Path) -> None:
    for i in range(TRIES + 3):
        plain(tmp_path / f"images/train/a/{i:02d}.png")
    source = tree(tmp_path / "images")
    shutil.move(tmp_path / "images/train", tmp_path / "images/gone")
    with pytest.raises(ValueError, match=r"train/a/00\.png and the files after it could be read when training began"):
        source.image(0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, r"data\.root=.*images is not a folder"),
        (lambda root: plain(root / "cats/a.png"), r"data\.root=.*has no folder train; put .* into .*/train/<class>/"),
        (lambda root: plain(root / "train/a.png"), r"data\.root=.*train has no class folders"),
        (lambda root: (root / "train/a").mkdir(parents=True), r"data\.root=.*train: none of 0 files can be read"),
    ],
    ids=["missing", "no train", "flat", "nothing inside"],
)  # fmt: skip
def test_a_wrong_root_is_named(tmp_path: Path, make: Any, message: str) -> None:
    make(tmp_path / "images")
    with pytest.raises(FileNotFoundError, match=message):
        tree(tmp_path / "images")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"view": "round"}, r"data\.view=round is unknown; choose native, square, squares, mixed or flexible"),
        ({"check": "none"}, r"data\.check=none is unknown; choose header or full"),
        ({"view": "square", "size": 20}, r"data\.size=20 must be a multiple of 8 pixels"),
    ],
)
def test_wrong_options_are_named(images: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tree(images, **options)


@pytest.mark.parametrize(
    ("name", "view", "size", "tokens"),
    [
        ("imagenet_native", "native", None, 4096),
        ("imagenet_256", "square", 256, None),
        ("imagenet_512", "square", 512, None),
        ("imagenet_mixed", "mixed", 256, 4096),
        ("imagenet_flexible", "flexible", 256, None),
    ],
)
def test_the_configurations_have_the_published_views(
    name: str, view: str, size: int | None, tokens: int | None
) -> None:
    data = composed(f"data={name}", "data.root=x")["data"]
    assert data["_target_"] == "genfound.data.images.imagenet.ImageTree"
    assert data["view"] == view
    assert size in (None, data["size"])
    assert data["max_image_tokens"] == tokens
    assert data["max_tokens"] == 16384
    assert data["holdout"] is None
    assert set(data) - {"_target_", "batch_size", "num_workers", "flip"} == {"root", "index", *DEFAULTS} - {
        "unit", "split", "seed"
    }  # fmt: skip


def test_an_index_that_is_not_one_is_made_anew(images: Path) -> None:
    first = tree(images)
    (file,) = (images.parent / "index").iterdir()
    for content in ("", "{", '{"other": 1}', "[]"):
        file.write_text(content)
        assert tree(images).fingerprint == first.fingerprint
        assert index._read(file) == first.found


def test_a_folder_and_a_tree_do_not_share_an_index(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    (tmp_path / "images/train/a").mkdir(parents=True)
    Image.new("RGB", (40, 24), RED).save(tmp_path / "images/train/a/turned.jpg", exif=exif)
    options = {key: value for key, value in DEFAULTS.items() if key != "check"}
    folder = ImageFolder(root=str(tmp_path / "images/train"), index=str(tmp_path / "index"), **with_views(options))
    assert folder.sizes.tolist() == [[40, 24]]
    assert tree(tmp_path / "images").sizes.tolist() == [[24, 40]]
    assert len(list((tmp_path / "index").iterdir())) == 2


def test_many_new_files_are_announced(
    images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(index, "MANY", 10)
    tree(images)
    assert "looking into 15 new files; this is done once" in capsys.readouterr().out
    tree(images)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("folder", ["", "n02"])
def test_a_folder_that_may_not_be_read_is_named(images: Path, monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    """As the superuser, who may read everything, the refusal has to be made up."""
    closed, scandir, iterdir = images / "train" / folder, os.scandir, Path.iterdir

    def refuse(path: Any) -> None:
        if Path(path) == closed:
            raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", lambda path: (refuse(path), scandir(path))[1])
    monkeypatch.setattr(Path, "iterdir", lambda path: (refuse(path), iterdir(path))[1])
    with pytest.raises(PermissionError, match=f"Permission denied: '{closed}'"):
        tree(images)
