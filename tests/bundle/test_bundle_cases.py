"""The table of damaged bundles that the Python and the C++ runtime are both held to: tests/bundle_cases.json."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bca_deploy
from bca_deploy.bundle import selftest
from bca_deploy.bundle.read import Bundle, read_manifest
from bca_deploy.errors import BundleError, ParityError

TESTS = Path(__file__).parents[1]
FIXTURE = TESTS / "fixtures" / "format1"
TABLE = json.loads((TESTS / "bundle_cases.json").read_text(encoding="utf-8"))


def change(case: dict[str, Any]) -> tuple[str, str]:
    if "engine" in case:
        return '"engines": []', f'"engines": [{json.dumps(TABLE["engine"] | case["engine"])}]'
    return case["from"], case["to"]


@pytest.mark.parametrize("case", TABLE["manifest"], ids=lambda case: case["case"])
def test_a_manifest_is_taken_or_refused_as_the_table_says(case: dict[str, Any], tmp_path: Path) -> None:
    text = (FIXTURE / "manifest.json").read_text(encoding="utf-8")
    before, after = change(case)
    assert before in text
    (tmp_path / "manifest.json").write_text(text.replace(before, after, 1), encoding="utf-8")
    if case["error"] is None:
        read_manifest(tmp_path)
        return
    with pytest.raises(BundleError) as error:
        read_manifest(tmp_path)
    assert case["error"] in str(error.value)


def changed(arrays: dict[str, np.ndarray], case: dict[str, Any]) -> dict[str, np.ndarray]:
    kept = {name: array for name, array in arrays.items() if not name.startswith(case.get("drop", "\0"))}
    if put := case.get("put"):
        kept[put["name"]] = np.full(put["shape"], put.get("fill", 0), put["dtype"])
    return kept


@pytest.mark.parametrize("case", TABLE["selftest"], ids=lambda case: case["case"])
def test_a_selftest_is_run_or_refused_as_the_table_says(case: dict[str, Any], tmp_path: Path) -> None:
    broken = Path(shutil.copytree(FIXTURE, tmp_path / "broken"))
    np.savez_compressed(broken / "selftest.npz", **changed(selftest.read(FIXTURE / "selftest.npz"), case))
    with bca_deploy.open(broken, "onnxruntime-cpu", threads=1, verify="off") as session:
        if case["error"] is None:
            session.selftest()
            return
        with pytest.raises(ParityError if case.get("parity") else BundleError) as error:
            session.selftest()
    assert str(error.value).startswith(case["error"])


@pytest.mark.parametrize("damage", [lambda content: content[:-100], lambda content: b"", lambda content: b"PK\x03\x04 no zip"])
def test_a_selftest_that_is_no_archive_is_refused(damage: Any, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(FIXTURE, tmp_path / "broken"))
    (broken / "selftest.npz").write_bytes(damage((FIXTURE / "selftest.npz").read_bytes()))
    with (
        bca_deploy.open(broken, "onnxruntime-cpu", threads=1, verify="off") as session,
        pytest.raises(BundleError, match=r"selftest\.npz is .*; copy or export the bundle again"),
    ):
        session.selftest()


def test_a_selftest_of_words_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "selftest.npz", **{"fp32/case/output/out": np.array(["word"])})
    with pytest.raises(BundleError, match=r"^selftest\.npz: fp32/case/output/out holds no numbers; export"):
        selftest.read(tmp_path / "selftest.npz")


# What no table holds: links, long names, and paths. runtime/tests/test_bundle.cpp and test_session.cpp do the same.


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FIXTURE, tmp_path / "copy"))


@pytest.mark.parametrize("name", ["manifest.json", "expect.npz", "selftest.npz", "models"])
def test_a_link_that_leads_to_itself_is_named_in_a_sentence(copy: Path, name: str) -> None:
    path = copy / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.symlink_to(name)
    with pytest.raises(BundleError, match=rf"{name}\S* cannot be read: Too many levels of symbolic links; check permissions"):
        Bundle.open(copy)


def test_a_manifest_that_is_a_link_is_judged_as_any_file(copy: Path) -> None:
    manifest = copy / "manifest.json"
    manifest.rename(copy.parent / "outside.json")
    manifest.symlink_to("../outside.json")
    with pytest.raises(
        BundleError, match=r"unsafe path 'manifest\.json': it is a link that leads out of the bundle; .*copy it"
    ):
        Bundle.open(copy)
    (copy.parent / "outside.json").rename(copy / "models" / "kept.json")
    manifest.unlink()
    manifest.symlink_to("models/kept.json")
    Bundle.open(copy)


LONG = "n" * 5000


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('"expect.npz"', f'"{LONG}"', r"no system has a file named n{40}\.\.\. \(5000 characters\); do not use this bundle"),
        ('"expect.npz"', f'"{"d/" * 2100}d"', r"no system has a file named (d/){20}\.\.\. \(4201 characters\); do not use"),
        ('"name": "x"', f'"name": "{LONG}"', r"signature: the name n{40}\.\.\. has 5000 bytes; at most 255; export the bundle"),
        (
            '"context_len": {',
            f'"{LONG}": {{',
            r"signature: the name n{40}\.\.\. has 5000 bytes; at most 255; export the bundle",
        ),
    ],
)
def test_a_name_of_5000_characters_is_refused_in_one_short_sentence(copy: Path, before: str, after: str, message: str) -> None:
    text = (copy / "manifest.json").read_text(encoding="utf-8")
    assert before in text
    (copy / "manifest.json").write_text(text.replace(before, after, 1), encoding="utf-8")
    with pytest.raises(BundleError, match=message) as error:
        Bundle.open(copy)
    assert len(str(error.value)) < 400


def test_a_file_with_a_long_name_that_is_not_there_is_told_in_short(copy: Path) -> None:
    with Bundle.open(copy) as bundle, pytest.raises(BundleError, match=r"has no n{40}\.\.\. \(5000 characters\); it has"):
        bundle.path(LONG)


def test_a_path_that_is_not_utf_8_is_as_good_as_any(copy: Path, tmp_path: Path) -> None:
    place = tmp_path / os.fsdecode(b"caf\xe9")
    copy.rename(place)
    with bca_deploy.open(place, "onnxruntime-cpu", threads=1) as session:
        session.selftest()


def test_the_table_has_no_case_twice() -> None:
    for part in ("manifest", "selftest"):
        names = [case["case"] for case in TABLE[part]]
        assert len(names) == len(set(names)) > 10
