"""Files are replaced whole, or not at all; arrays are read, or the file is refused and closed."""

import gc
from pathlib import Path

import numpy as np
import pytest

from bca_deploy.errors import InputError
from bca_deploy.files import read_arrays, replacing


def test_what_was_written_takes_the_place_of_the_old(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    path.write_text("old")
    with replacing(path) as partial:
        assert partial.suffix == ".npz"  # numpy would add it, and write elsewhere
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_after_an_error_the_old_file_is_there_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError), replacing(path) as partial:
        partial.write_text("new, and then something that fails: \ud800", encoding="utf-8")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_arrays_are_read_by_name_and_a_single_one_without(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "two.npz", x=np.arange(3), y=np.ones((2, 2), np.float16))
    np.save(tmp_path / "one.npy", np.arange(3))
    two, one = read_arrays(tmp_path / "two.npz"), read_arrays(tmp_path / "one.npy")
    assert (list(two), two["y"].dtype, two["x"].tolist()) == (["x", "y"], np.float16, [0, 1, 2])
    assert (list(one), one[""].tolist()) == ([""], [0, 1, 2])


@pytest.mark.parametrize("suffix", [".npz", ".npy"])
def test_a_file_cut_anywhere_is_refused_and_closed(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    np.savez_compressed(path, x=np.arange(30)) if suffix == ".npz" else np.save(path, np.arange(30))
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=rf"a{suffix} is not a readable .npz or .npy of plain arrays: .*numpy.savez"):
            read_arrays(path)
    gc.collect()  # a file left open warns here, and warnings fail a test


def test_objects_and_damaged_streams_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, x=np.array([None, 1], dtype=object))
    with pytest.raises(InputError, match="Object arrays cannot be loaded"):
        read_arrays(path)
    np.savez_compressed(path, x=np.random.default_rng(0).random(1000))
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 0xFF
    path.write_bytes(whole)
    with pytest.raises(InputError, match="is not a readable"):
        read_arrays(path)
