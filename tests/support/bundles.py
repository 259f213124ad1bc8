"""What a directory or a bundle holds, held against what it held."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from support.rounding import is_same

from bca_deploy.parity.verdict import Group, Verdict


def files_of(directory: Path) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


#: What PyTorch measured: nothing fixes the last bits of its results, not even from one call to the next.
MEASURED = {"expect.npz", "parity.json", "selftest.npz"}


def assert_same_bundle(one: Path, other: Path, proven_alike: bool = True) -> None:
    """Hold two bundles of the same weights to be the same, to the byte but for times, engines and what was measured.

    Args:
        one: a bundle.
        other: another.
        proven_alike: the same was there to prove both: a live module, a sample, or nothing.
    """
    first, again = files_of(one), files_of(other)
    assert set(first) == set(again)
    changing = MEASURED | {"build.json", "manifest.json"} | {name for name in first if name.startswith("engines/")}
    assert [name for name in first if first[name] != again[name] and name not in changing] == []
    manifests = plain(one), plain(other)
    assert (manifests[0].pop("trust") == manifests[1].pop("trust")) == proven_alike
    assert manifests[0] == manifests[1]
    for name in ("selftest.npz", "expect.npz"):
        with np.load(one / name) as wanted, np.load(other / name) as got:
            assert set(got) == set(wanted)
            for key in got:
                assert same_measure(key, got[key], wanted[key]), (name, key)


def plain(bundle: Path) -> dict[str, Any]:
    """The manifest and the outline of parity.json without what was measured and without engines."""
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    manifest["files"] = {name: entry for name, entry in manifest["files"].items() if name not in MEASURED}
    manifest["files"] = {name: entry for name, entry in manifest["files"].items() if not name.startswith("engines/")}
    for model in manifest["models"]:
        del model["parity"]["worst_ratio"]
    reports = json.loads((bundle / "parity.json").read_text(encoding="utf-8"))["models"]
    outline = [(r["model"], r["passed"], r["cases"], len(r["results"])) for r in reports]
    return manifest | {"engines": None, "parity.json": outline}


def same_measure(key: str, got: np.ndarray, wanted: np.ndarray) -> bool:
    """Whether two arrays of selftest.npz or expect.npz say the same."""
    kind = key.split("/")[-2] if "/" in key else key
    if kind in ("out", "context_out"):  # of PyTorch, in float32
        return is_same(got, wanted)
    if kind == "output":  # in float64
        return bool(np.abs(got - wanted).max() <= 1e-12)
    if kind == "bound":  # what PyTorch is off by, which is made of last bits, and what is allowed beside it
        return bool(0.5 * wanted <= got <= 2 * wanted)
    return np.array_equal(got, wanted)


def contents(directory: Path) -> dict[str, str]:
    """Return everything under ``directory``, hidden files, links and directories too."""
    return {
        path.relative_to(directory).as_posix(): f"-> {path.readlink()}"
        if path.is_symlink()
        else "a directory"
        if path.is_dir()
        else path.read_bytes().decode("latin-1")
        for path in sorted(directory.rglob("*"))
    }


@contextmanager
def untouched(directory: Path) -> Iterator[None]:
    before = contents(directory)
    yield
    assert contents(directory) == before


def plain_verdict(failures: tuple[str, ...] = (), ratio: float = 1.0) -> Verdict:
    group = Group("no mask", "plain", "onnxruntime", 1, ratio, 1.5, None, None, 0, 0.0, 0.0, 0.0, 0.0, 1.0)
    return Verdict("fp32", "fp32", "quick", (), (group,), failures, 0.0)
