import hashlib
from pathlib import Path

import numpy as np
import pytest

from genfound.data.images.npz import file_hash, headers, read_member

PICTURES = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3)).astype(np.uint8)


def flipped(file: Path, place: int) -> Path:
    content = bytearray(file.read_bytes())
    content[place] ^= 255
    file.write_bytes(content)
    return file


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_the_hash_is_that_of_sha256sum(tmp_path: Path, save: object) -> None:
    save(tmp_path / "x.npz", arr_0=PICTURES, arr_1=np.arange(40))  # type: ignore[operator]
    assert file_hash(tmp_path / "x.npz") == hashlib.sha256((tmp_path / "x.npz").read_bytes()).hexdigest()[:16]
    assert headers(tmp_path / "x.npz") == {"arr_0": ((40, 16, 16, 3), np.uint8), "arr_1": ((40,), np.int64)}


def test_one_flipped_byte_of_a_mapped_array_is_found(tmp_path: Path) -> None:
    for place in (300, 15_000, 30_000):
        np.savez(tmp_path / "x.npz", arr_0=PICTURES)
        with pytest.raises(ValueError, match=r"x\.npz is damaged .*: Bad CRC-32 for file 'arr_0\.npy'"):
            file_hash(flipped(tmp_path / "x.npz", place))


def test_flipped_bytes_of_a_compressed_file_are_one_line(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "whole.npz", arr_0=PICTURES // 64)
    size, refused = (tmp_path / "whole.npz").stat().st_size, 0
    for place in range(0, size, size // 150):
        (tmp_path / "x.npz").write_bytes((tmp_path / "whole.npz").read_bytes())
        flipped(tmp_path / "x.npz", place)
        try:
            read_member(tmp_path / "x.npz", "arr_0")
        except ValueError as error:
            assert "x.npz is damaged" in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 100
