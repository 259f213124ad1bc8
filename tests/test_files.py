"""Files are replaced whole, or not at all."""

from pathlib import Path

import pytest

from bca_deploy.files import replacing


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
