import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from genfound.data.images.sets import (
    Cropped,
    FolderImages,
    ImageSet,
    NpzImages,
    Subset,
    image_files,
    open_images,
    read_note,
)
from genfound.evaluation.export import export
from tests.image_sets import Pictures, save_pngs

NOTE = {"drawing": {"seed": 3}}


def same(a: ImageSet, b: ImageSet) -> bool:
    return len(a) == len(b) and all(np.array_equal(a[k], b[k]) for k in range(len(a)))


@pytest.mark.parametrize("to", ["out.npz", "out"])
def test_what_is_exported_is_read_again(to: str, tmp_path: Path) -> None:
    images = Pictures([(6, 9)] * 70)
    path = export(images, str(tmp_path / to), NOTE)
    again = open_images(path)
    assert same(images, again) and again.sizes.tolist() == [[6, 9]] * 70
    assert again.labels is not None and again.labels.tolist() == images.labels.tolist()
    assert read_note(path) == NOTE
    assert sorted(p.name for p in tmp_path.iterdir()) == [to]


def test_numpy_reads_the_npz_as_adms_evaluator_does(tmp_path: Path) -> None:
    images = Pictures([(5, 4)] * 3)
    with np.load(export(images, str(tmp_path / "x.npz"), NOTE)) as file:
        assert np.array_equal(file["arr_0"], np.stack(images.images)) and file["arr_0"].dtype == np.uint8
        assert file["arr_1"].tolist() == images.labels.tolist()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_files_of_numpy_are_read(save: object, tmp_path: Path) -> None:
    images = Pictures([(5, 4)] * 9)
    save(tmp_path / "x.npz", np.stack(images.images))  # type: ignore[operator]
    read = NpzImages(tmp_path / "x.npz")
    assert same(images, read) and read.labels is None
    assert isinstance(read.array, np.memmap) == (save is np.savez)


def test_images_of_several_sizes_go_into_a_folder_only(tmp_path: Path) -> None:
    images = Pictures([(6, 9), (4, 4)])
    with pytest.raises(ValueError, match="an npz file holds images of one size"):
        export(images, str(tmp_path / "x.npz"), NOTE)
    assert same(images, open_images(export(images, str(tmp_path / "x"), NOTE)))
    with pytest.raises(ValueError, match="exists; give an empty folder"):
        export(images, str(tmp_path / "x"), NOTE)


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path: Path) -> None:
    for name, level in (
        ("b/2.png", 2),
        ("a/10.png", 0),
        ("a/9.png", 1),
        (".hidden/0.png", 9),
        ("__MACOSX/0.png", 9),
        ("c.jpeg", 3),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (level,) * 3).save(tmp_path / name)
    (tmp_path / "readme.txt").write_text("not an image")
    images = FolderImages(tmp_path)
    assert [int(images[k][0, 0, 0]) for k in range(len(images))] == [0, 1, 2, 3]


def test_files_with_one_way_to_rgb_are_converted(tmp_path: Path) -> None:
    grey = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    for mode in ("L", "P", "RGB", "1"):
        grey.convert(mode).save(tmp_path / f"{mode}.png")
    images = FolderImages(tmp_path)
    assert all(images[k].shape == (8, 8, 3) and images[k].dtype == np.uint8 for k in range(4))


def wrong_files(folder: Path) -> dict[str, Path]:
    whole = np.zeros((3, 4, 4, 3), dtype=np.uint8)
    arrays = {
        "float": whole.astype(np.float32) / 255, "grey": whole[..., :1], "one": whole[0], "none": whole[:0],
        "objects": np.array([{}]),
    }  # fmt: skip
    for name, array in arrays.items():
        np.savez(folder / f"{name}.npz", array)
    np.savez(folder / "unnamed.npz", images=whole)
    np.savez(folder / "whole.npz", np.zeros((50, 16, 16, 3), dtype=np.uint8))
    (folder / "cut.npz").write_bytes((folder / "whole.npz").read_bytes()[:9000])
    (folder / "text.npz").write_text("not a zip file")
    (folder / "text.txt").write_text("text")
    (folder / "empty").mkdir()
    return {name: folder / f"{name}.npz" for name in (*arrays, "unnamed", "cut", "text")}


def test_wrong_npz_files_say_what_is_wrong(tmp_path: Path) -> None:
    files = wrong_files(tmp_path)
    messages = {
        "float": r"arr_0 is float32 \[3, 4, 4, 3\]; it must be uint8", "grey": r"\[3, 4, 4, 1\]; it must be",
        "one": r"uint8 \[4, 4, 3\]; it must be", "none": r"\[0, 4, 4, 3\]", "objects": "is damaged or is not an npz",
        "unnamed": "has no arr_0", "cut": "damaged", "text": "damaged or is not an npz",
    }  # fmt: skip
    for name, message in messages.items():
        with pytest.raises(ValueError, match=message):
            open_images(files[name])
    with pytest.raises(FileNotFoundError, match="there is no file"):
        open_images(tmp_path / "absent.npz")
    with pytest.raises(FileNotFoundError, match="empty holds no images"):
        open_images(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"neither an .npz file nor a folder"):
        open_images(tmp_path / "text.txt")


def test_wrong_image_files_are_named(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (8, 8), (1, 2, 3, 4))
    deep = Image.fromarray(np.full((8, 8), 40_000, dtype=np.uint16))
    for name, picture in (("clear", clear), ("deep", deep)):
        (tmp_path / name).mkdir()
        picture.save(tmp_path / name / "x.png")
        with pytest.raises(ValueError, match=r"x.png is .* with transparency or 16 bits"):
            FolderImages(tmp_path / name)[0]
    whole = save_pngs(tmp_path / "cut", Pictures([(40, 40)])) / "0000.png"
    whole.write_bytes(whole.read_bytes()[:900])
    with pytest.raises(ValueError, match=r"0000.png cannot be read as an image: "):
        FolderImages(tmp_path / "cut")[0]
    whole.write_bytes(b"")
    with pytest.raises(ValueError, match=r"0000.png cannot be read as an image"):
        FolderImages(tmp_path / "cut").sizes  # noqa: B018


def test_images_above_the_limit_of_pixels_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    folder = save_pngs(tmp_path / "x", Pictures([(4, 10), (6, 8)]))
    with pytest.raises(
        ValueError, match=r"0001.png cannot be read .*48 pixels.*; max_pixels=N takes images of up to N"
    ):
        FolderImages(folder).sizes  # noqa: B018
    with pytest.raises(ValueError, match=r"0001.png cannot be read .*: its 6 x 8 pixels are more than max_pixels=47"):
        open_images(folder, 47)[1]
    assert open_images(folder, 48)[1].shape == (6, 8, 3)


def test_labels_must_be_one_for_each_image(tmp_path: Path) -> None:
    folder = save_pngs(tmp_path / "x", Pictures([(4, 4)] * 3))
    (folder / "labels.txt").write_text("1\n2\n")
    with pytest.raises(ValueError, match="2 labels for 3 images"):
        FolderImages(folder)


def test_a_damaged_protocol_is_not_ignored(tmp_path: Path) -> None:
    folder = save_pngs(tmp_path / "x", Pictures([(4, 4)]))
    (folder / "protocol.json").write_text(json.dumps(NOTE)[:-4])
    with pytest.raises(ValueError, match="the protocol beside the images is damaged"):
        read_note(folder)


def test_views_have_sizes_labels_and_keys_of_their_own() -> None:
    images = Pictures([(8, 8), (6, 12), (20, 10)])
    chosen, cropped = Subset(images, [2, 0]), Cropped(images, (6, 6))
    assert chosen.sizes.tolist() == [[20, 10], [8, 8]] and np.array_equal(chosen[1], images[0])
    assert chosen.labels is not None and chosen.labels.tolist() == images.labels[[2, 0]].tolist()
    assert cropped[1].shape == (6, 6, 3) and cropped.sizes.tolist() == [[6, 6]] * 3
    assert len({images.key, chosen.key, cropped.key, Subset(images, [0, 2]).key, Cropped(images, (6, 4)).key}) == 5


def test_what_adm_ignores_is_no_damage(tmp_path: Path) -> None:
    images = Pictures([(4, 4)] * 3)
    for labels in (np.array([{}, {}, {}]), np.arange(2), np.ones(3)):
        np.savez(tmp_path / "x.npz", np.stack(images.images), labels)
        read = open_images(tmp_path / "x.npz")
        assert same(images, read) and read.labels is None


@pytest.mark.parametrize("note", [np.arange(3), np.array(2.0), np.array("[1, 2]"), np.array([{}])])
def test_a_member_named_protocol_of_others_is_none_of_ours(note: np.ndarray, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", np.stack(Pictures([(4, 4)] * 3).images), protocol=note)
    assert read_note(tmp_path / "x.npz") is None


def test_the_grid_of_samples_is_no_sample(tmp_path: Path) -> None:
    for name in ("00000_a.png", "grid.png", "class/grid.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    files, ignored = image_files(tmp_path)
    assert [file.relative_to(tmp_path).as_posix() for file in files] == ["00000_a.png", "class/grid.png"]
    assert not ignored


def test_no_file_is_left_out_in_silence(tmp_path: Path) -> None:
    images, elsewhere = tmp_path / "images", tmp_path / "elsewhere"
    for folder in (images, elsewhere / "deeper"):
        folder.mkdir(parents=True)
    names = ("a.png", "b.TIF", "c.jfif", "d.webp", "e.bmp", "f.gif", "g.jpeg")
    for name in (*names, "._a.png"):
        suffix = {"c.jfif": "jpeg"}.get(name, Path(name).suffix[1:].lower())
        Image.new("RGB", (4, 4)).save(images / name, format={"tif": "tiff"}.get(suffix, suffix))
    Image.new("RGB", (4, 4)).save(elsewhere / "deeper/h.png")
    for name in ("notes.txt", "list.TXT", "Makefile", ".DS_Store"):
        (images / name).write_text("no image")
    (images / "linked").symlink_to(elsewhere)
    (images / "again.png").symlink_to(images / "a.png")
    (elsewhere / "deeper/round").symlink_to(elsewhere)
    found = FolderImages(images)
    assert [file.name for file in found.files] == ["a.png", "again.png", *names[1:], "h.png"]
    assert all(found[k].shape == (4, 4, 3) for k in range(len(found)))
    assert found.ignored == {".txt": 2, "hidden": 1, "without suffix": 1}
    (images / "lost.png").symlink_to(images / "nowhere.png")
    with pytest.raises(FileNotFoundError, match=r"lost.png is a link that leads nowhere"):
        FolderImages(images)


def test_the_order_by_content_does_not_follow_the_names(tmp_path: Path) -> None:
    pictures = Pictures([(6, 6)] * 40)
    given = FolderImages(save_pngs(tmp_path / "a", pictures))
    moved = tmp_path / "b"
    (moved / "class").mkdir(parents=True)
    for number, place in enumerate(np.random.default_rng(0).permutation(40)):
        shutil.copy(given.files[number], moved / ("class" if place % 2 else "") / f"{place:02d}.png")
    renamed = FolderImages(moved)
    (hashed, one), (again, other) = given.content(), renamed.content()
    assert same(Subset(given, one), Subset(renamed, other))
    assert one.tolist() != list(range(40)) and sorted(one.tolist()) == list(range(40))
    digests = sorted(hashlib.sha256(file.read_bytes()).digest() for file in given.files)
    words = np.frombuffer(b"".join(digests), dtype=">u8").astype(np.uint64)
    assert hashed == again == hashlib.sha256(words.tobytes()).hexdigest()[:16]
