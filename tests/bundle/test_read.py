"""The bundle format: opened without torch or onnx, refused when damaged, unsafe or newer, and the same bytes every time."""

import contextlib
import errno
import importlib
import json
import os
import pkgutil
import shutil
import stat
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from pydantic import ValidationError
from safetensors.torch import save_file
from support.bundles import assert_same_bundle, files_of
from support.layers import make_checkpoint
from support.processes import HEAVY, run_without

import bca_deploy
from bca_deploy.bundle import read as bundle_module
from bca_deploy.bundle import selftest
from bca_deploy.bundle.engine_options import BuildOptions
from bca_deploy.bundle.manifest import Manifest, json_schema, signature_of
from bca_deploy.bundle.read import Bundle, Check, read_manifest, sha256
from bca_deploy.bundle.write import staged
from bca_deploy.errors import BcaError, BundleError, InputError
from bca_deploy.spec import LAYER_DIMS, Interface, layer_signature


@pytest.fixture
def copy(exported: Bundle, tmp_path: Path) -> Path:
    """A bundle to damage."""
    return Path(shutil.copytree(exported.directory, tmp_path / "copy"))


@pytest.fixture
def archive(exported: Bundle, tmp_path: Path) -> Path:
    """The bundle as one file."""
    path = tmp_path / "model.bca"
    with staged(path) as directory:
        shutil.copytree(exported.directory, directory, dirs_exist_ok=True)
    return path


@pytest.fixture
def unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where archives are unpacked in this test."""
    path = tmp_path / "temporary"
    path.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(path))
    return path


def edit(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest as a forger would: as JSON."""
    path = directory / "manifest.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def flip_byte(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def records_start(archive: Path) -> int:
    """Where the archive's own directory begins: after the files, and .npz files are archives themselves."""
    with zipfile.ZipFile(archive) as file:
        return file.start_dir


# ---- opening


@pytest.mark.parametrize("check", ["full", "size", "off"])
def test_a_directory_opens(exported: Bundle, check: Check) -> None:
    for path in (exported.directory, str(exported.directory)):
        with Bundle.open(path, check) as bundle:
            assert bundle.directory == exported.directory
            assert bundle.manifest == exported.manifest
    assert exported.directory.is_dir()  # closing a directory's bundle leaves the directory


def test_an_archive_opens_in_a_private_directory_that_goes_when_it_is_closed(
    exported: Bundle, archive: Path, unpacked: Path
) -> None:
    with Bundle.open(archive) as bundle:
        assert bundle.manifest == exported.manifest
        assert bundle.directory.parent == unpacked
        assert stat.S_IMODE(bundle.directory.stat().st_mode) == 0o700
        assert files_of(bundle.directory) == files_of(exported.directory)
    assert list(unpacked.iterdir()) == []
    bundle.close()  # a second time does no harm


def test_an_archive_whose_block_fails_is_closed_too(archive: Path, unpacked: Path) -> None:
    with pytest.raises(ValueError, match="mine"), Bundle.open(archive):
        raise ValueError("mine")
    assert list(unpacked.iterdir()) == []


def test_a_file_that_the_manifest_does_not_list_is_no_part_of_the_bundle(copy: Path) -> None:
    (copy / "notes.txt").write_text("mine")
    with Bundle.open(copy) as bundle, pytest.raises(BundleError, match=r"has no notes\.txt; it has .*models/fp32\.onnx"):
        bundle.path("notes.txt")


# ---- damage


def test_a_changed_byte_of_any_file_is_found_and_the_file_named(copy: Path, exported: Bundle) -> None:
    assert len(exported.manifest.files) >= 6
    for name in exported.manifest.files:
        size = (copy / name).stat().st_size
        for position in (0, size // 2, size - 1):
            flip_byte(copy / name, position)
            with pytest.raises(BundleError, match=rf"^{name} has changed since the export .*sha256.*export the bundle again"):
                Bundle.open(copy)
            flip_byte(copy / name, position)
    Bundle.open(copy)


def test_a_changed_byte_is_beyond_the_quicker_checks(copy: Path) -> None:
    flip_byte(copy / "models/fp32.onnx", 100)
    Bundle.open(copy, "size")
    Bundle.open(copy, "off")


@pytest.mark.parametrize("check", ["full", "size"])
@pytest.mark.parametrize("change", [lambda content: content[:-1], lambda content: content + b"\0", lambda content: b""])
def test_another_size_is_found_and_the_file_named(copy: Path, check: Check, change: Callable[[bytes], bytes]) -> None:
    path = copy / "models/fp16.onnx"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(BundleError, match=r"^models/fp16\.onnx has \d+ bytes, the manifest says \d+; copy or export"):
        Bundle.open(copy, check)
    Bundle.open(copy, "off")


@pytest.mark.parametrize("check", ["full", "size", "off"])
def test_a_missing_file_is_named(copy: Path, check: Check) -> None:
    (copy / "selftest.npz").unlink()
    with pytest.raises(BundleError, match=r"^selftest\.npz is missing from .*; copy or export the bundle again"):
        Bundle.open(copy, check)


def test_a_directory_in_place_of_a_file_is_missing(copy: Path) -> None:
    (copy / "selftest.npz").unlink()
    (copy / "selftest.npz").mkdir()
    with pytest.raises(BundleError, match=r"^selftest\.npz is missing"):
        Bundle.open(copy)


def test_build_json_may_go_or_change(copy: Path) -> None:
    (copy / "build.json").write_text("anything")
    Bundle.open(copy)
    (copy / "build.json").unlink()
    Bundle.open(copy)


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: None], ids=["empty directory", "nothing"])
def test_what_is_not_a_bundle_is_refused(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "there")
    with pytest.raises(BundleError, match=r"there is not a bundle: it has no manifest\.json; make one with bca-export"):
        Bundle.open(tmp_path / "there")


def test_a_folder_that_is_no_bundle_gets_advice_that_works(copy: Path) -> None:
    above = copy.parent
    with pytest.raises(BundleError, match=rf"manifest\.json; bundles are in it: {copy}$"):
        Bundle.open(above)
    with pytest.raises(BundleError, match=rf"models is not a bundle: .*manifest\.json; it is in the bundle {copy}$"):
        Bundle.open(copy / "models")
    (above / "work").mkdir()
    (above / "work" / "notes.txt").write_text("mine")  # into which no bundle is written
    with pytest.raises(BundleError, match=rf"make one with bca-export --out {above / 'work' / 'model'}$"):
        Bundle.open(above / "work")


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 no zip"])
def test_a_file_that_is_no_archive_is_refused(tmp_path: Path, unpacked: Path, content: bytes) -> None:
    (tmp_path / "model.bca").write_bytes(content)
    with pytest.raises(BundleError, match=r"model\.bca is neither a bundle directory nor a readable \.bca archive"):
        Bundle.open(tmp_path / "model.bca")
    assert list(unpacked.iterdir()) == []


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b'{"format": 1,}', b"\xff\xfe", b'{"format": ' + b"1" * 5000 + b"}", b"[" * 200_000],
    ids=["empty", "cut", "comma", "not UTF-8", "endless number", "deep"],
)
def test_a_manifest_that_is_not_json_is_refused(copy: Path, content: bytes) -> None:
    (copy / "manifest.json").write_bytes(content)
    with pytest.raises(BundleError, match=r"manifest\.json is not JSON .*; export the bundle again"):
        Bundle.open(copy)


@pytest.mark.parametrize("content", ["[]", "null", '"manifest"', "1", "{}"])
def test_a_manifest_of_another_kind_is_refused(copy: Path, content: str) -> None:
    (copy / "manifest.json").write_text(content)
    with pytest.raises(BundleError, match=r"manifest\.json: field .*; export the bundle again"):
        Bundle.open(copy)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda m: m.update(extra=1), "extra"),
        (lambda m: m["layers"][0]["spec"].update(extra=1), r"layers\.0\.spec\.extra"),
        (lambda m: m["models"][0].update(extra=1), r"models\.0\.extra"),
        (lambda m: m["signature"]["dims"]["batch"].update(extra=1), r"signature\.dims\.batch\.extra"),
        (lambda m: m["signature"].update(extra=1), r"signature\.extra"),
        (lambda m: m["signature"]["inputs"][0].update(extra=1), r"signature\.inputs\.0\.extra"),
        (lambda m: m["signature"]["inputs"][0].update(dtype="float8"), r"signature\.inputs\.0\.dtype"),
        (lambda m: m["signature"]["dims"].pop("x_len"), "signature"),
        (lambda m: m["signature"].update(batch="x"), "signature"),
        (lambda m: m["signature"]["masks"].update(x_len="context_mask"), "signature"),
        (lambda m: m["signature"]["outputs"][0].update(name="x"), "signature"),
        (lambda m: m.pop("files"), "files"),
        (lambda m: m["models"][1].pop("opset"), r"models\.1\.opset"),
        (lambda m: m["models"][0].update(precision="fp8"), r"models\.0\.precision"),
        (lambda m: m["files"]["parity.json"].update(sha256="00"), r"files\.parity\.json\.sha256"),
        (lambda m: m["files"]["parity.json"].update(bytes=-1), r"files\.parity\.json\.bytes"),
        (lambda m: m["signature"]["dims"]["x_len"].update(min=0), r"signature\.dims\.x_len"),
        (lambda m: m["layers"][0]["spec"].update(heads=0), r"layers\.0\.spec"),
        (lambda m: m.update(models=[]), "models"),
        (lambda m: m.update(format=0), "format"),
        (lambda m: m.update(format="1"), "format"),
        (lambda m: m.pop("format"), "format"),
    ],
)
def test_a_field_that_is_unknown_missing_or_wrong_is_named(
    copy: Path, change: Callable[[dict[str, Any]], object], field: str
) -> None:
    edit(copy, change)
    with pytest.raises(BundleError, match=rf"manifest\.json: field {field}: .*; export the bundle again"):
        Bundle.open(copy)


@pytest.mark.parametrize("check", ["full", "off"])
def test_a_newer_format_is_refused_by_its_number(copy: Path, check: Check) -> None:
    # Whatever else is in there: the rest of a newer format is not this version's to judge.
    (copy / "manifest.json").write_text('{"format": 2, "shards": [1, 2]}')
    message = (
        r"copy is a bundle of format 2, newer than the formats this version reads \(up to 1\); upgrade: pip install -U bca"
    )
    with pytest.raises(BundleError, match=message):
        Bundle.open(copy, check)


# ---- hostile bundles


@pytest.mark.parametrize("check", ["full", "off"])
@pytest.mark.parametrize(
    "name",
    [
        "../outside",
        "models/../../outside",
        "models/../parity.json",  # it stays inside, but nothing that writes bundles needs it
        "{bundle}/parity.json",
        "/etc/passwd",
        "models\\fp32.onnx",
        "",
        ".",
        "a\0b",
    ],
)
def test_an_unsafe_name_in_the_manifest_is_refused(copy: Path, name: str, check: Check) -> None:
    (copy.parent / "outside").write_text("secret")
    entry = {"bytes": 6, "sha256": sha256(copy.parent / "outside")}
    edit(copy, lambda manifest: manifest["files"].update({name.format(bundle=copy): entry}))
    with pytest.raises(BundleError, match=r"unsafe path .*do not use this bundle"):
        Bundle.open(copy, check)


@pytest.mark.parametrize("check", ["full", "off"])
@pytest.mark.parametrize("name", ["parity.json", "models"])
def test_a_link_that_leads_out_is_refused(copy: Path, name: str, check: Check) -> None:
    # The content outside is right, to the last byte: it is the place that is wrong.
    (copy / name).rename(copy.parent / "outside")
    (copy / name).symlink_to(copy.parent / "outside")
    with pytest.raises(BundleError, match=rf"unsafe path '{name}.*': it is a link that leads out of the bundle"):
        Bundle.open(copy, check)


def test_a_link_that_stays_inside_opens(copy: Path) -> None:
    (copy / "parity.json").rename(copy / "parity-1.json")
    (copy / "parity.json").symlink_to("parity-1.json")
    Bundle.open(copy)


def test_a_bundle_behind_a_link_opens(copy: Path) -> None:
    (copy.parent / "latest").symlink_to(copy)
    Bundle.open(copy.parent / "latest")


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "{outside}/evil", "..\\evil"])
def test_an_archive_that_climbs_out_is_refused_and_writes_nothing_outside(
    archive: Path, unpacked: Path, tmp_path: Path, name: str
) -> None:
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr(name.format(outside=tmp_path), "evil")
    with pytest.raises(BundleError, match=r"unsafe path .*do not use this bundle"):
        Bundle.open(archive)
    assert list(unpacked.iterdir()) == []
    assert list(tmp_path.rglob("*evil*")) == []


def test_an_archive_cannot_write_through_a_link_of_its_own(archive: Path, unpacked: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    link = zipfile.ZipInfo("models/link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr(link, str(tmp_path / "outside"))
        file.writestr("models/link/evil", "evil")
    with pytest.raises((BundleError, NotADirectoryError)):
        Bundle.open(archive)
    assert list(unpacked.iterdir()) == []
    assert list((tmp_path / "outside").iterdir()) == []


def test_an_archive_that_would_fill_the_disk_is_refused(archive: Path, unpacked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_module, "ARCHIVE_LIMIT_BYTES", 10_000)
    with pytest.raises(BundleError, match=r"model\.bca unpacks to more than 10000 bytes; unpack it by hand if you trust it"):
        Bundle.open(archive)
    assert list(unpacked.iterdir()) == []


def test_a_changed_byte_of_an_archive_is_refused_whichever_file_it_is_in(
    archive: Path, exported: Bundle, unpacked: Path
) -> None:
    whole = archive.read_bytes()
    for content in files_of(exported.directory).values():
        flip_byte(archive, whole.index(content) + len(content) // 2)
        with pytest.raises(BundleError, match=r"model\.bca is neither a bundle directory nor a readable \.bca archive"):
            Bundle.open(archive)
        archive.write_bytes(whole)
    assert list(unpacked.iterdir()) == []


def test_a_changed_bit_of_an_archives_own_records_is_refused_or_harmless(
    archive: Path, exported: Bundle, unpacked: Path
) -> None:
    whole = archive.read_bytes()
    for position in range(records_start(archive), len(whole), 3):
        archive.write_bytes(whole)
        flip_byte(archive, position)
        # A date or a mode may change; whatever does open is the bundle that was packed. An OSError is the disk's own.
        with contextlib.suppress(BundleError, OSError), Bundle.open(archive) as bundle:
            assert bundle.manifest == exported.manifest
    assert list(unpacked.iterdir()) == []


def test_a_truncated_archive_is_refused(archive: Path, unpacked: Path) -> None:
    whole = archive.read_bytes()
    for length in range(0, len(whole), len(whole) // 20):
        archive.write_bytes(whole[:length])
        # Cut after an .npz, an archive itself, it is a readable archive, but not of a bundle.
        with pytest.raises(BundleError, match=r"is neither a bundle directory nor a readable|it has no manifest\.json"):
            Bundle.open(archive)
    assert list(unpacked.iterdir()) == []


def rezip(archive: Path, exported: Bundle) -> None:
    """Pack the bundle as a user's own zip would: deflated."""
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in files_of(exported.directory).items():
            file.writestr(name, content)


def test_an_archive_packed_by_another_tool_opens(archive: Path, exported: Bundle) -> None:
    rezip(archive, exported)
    with Bundle.open(archive) as bundle:
        assert bundle.manifest == exported.manifest


def test_a_damaged_deflated_archive_is_refused(archive: Path, exported: Bundle, unpacked: Path) -> None:
    rezip(archive, exported)
    whole = archive.read_bytes()
    for position in range(40, len(whole) - 2000, len(whole) // 40):
        archive.write_bytes(whole[:position] + b"\xff" * 8 + whole[position + 8 :])
        with pytest.raises(BundleError):
            Bundle.open(archive)
    assert list(unpacked.iterdir()) == []


def test_an_encrypted_archive_is_refused(archive: Path, unpacked: Path) -> None:
    content = bytearray(archive.read_bytes())
    content[6] |= 1  # the flag in the first member's own header and in the directory at the end
    content[records_start(archive) + 8] |= 1
    archive.write_bytes(content)
    with pytest.raises(BundleError, match=r"model\.bca .*encrypted"):
        Bundle.open(archive)
    assert list(unpacked.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [("photo.jpg", "years of photos", r"it has no manifest\.json"), ("manifest.json", '{"format": 2}', "format 2, newer")],
)
def test_an_archive_of_no_bundle_is_refused_by_its_own_name(
    tmp_path: Path, unpacked: Path, name: str, content: str, message: str
) -> None:
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as file:
        file.writestr(name, content)
    # Not by that of the temporary directory, which the user never saw and which is gone.
    with pytest.raises(BundleError, match=rf"photos\.zip is .*{message}"):
        Bundle.open(tmp_path / "photos.zip")
    assert list(unpacked.iterdir()) == []


def test_a_changed_byte_in_an_archive_names_the_file(copy: Path, tmp_path: Path, unpacked: Path) -> None:
    flip_byte(copy / "models/fp32.onnx", 100)
    with staged(tmp_path / "changed.bca") as directory:
        shutil.copytree(copy, directory, dirs_exist_ok=True)
    with pytest.raises(BundleError, match=r"^models/fp32\.onnx has changed"):
        Bundle.open(tmp_path / "changed.bca")
    assert list(unpacked.iterdir()) == []


# ---- what needs what


def test_a_bundle_opens_and_is_inspected_without_the_export_packages(exported: Bundle, archive: Path) -> None:
    script = """
import bca_deploy
for path in sys.argv[1:]:
    with bca_deploy.Bundle.open(path) as bundle:
        print(bundle.manifest.layer.heads, bundle.path("models/fp32.onnx").name)
from bca_deploy.cli import app
for path in sys.argv[1:]:
    app(["inspect", path], standalone_mode=False)
assert not {"torch", "onnx", "onnxruntime", "einops"} & set(sys.modules)
"""
    done = run_without(HEAVY, script, exported.directory, archive)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("3 fp32.onnx") == 2
    assert done.stdout.count("bundle format 1, every hash right") == 2


def test_the_self_test_needs_only_numpy_and_onnxruntime(exported: Bundle) -> None:
    script = """
import numpy, onnxruntime
from bca_deploy import Bundle
from bca_deploy.bundle import selftest
with Bundle.open(sys.argv[1]) as bundle, numpy.load(bundle.path("selftest.npz")) as arrays:
    for model in bundle.manifest.models:
        session = onnxruntime.InferenceSession(bundle.path(model.file), providers=["CPUExecutionProvider"])
        names = [output.name for output in bundle.manifest.signature.outputs]
        run = lambda inputs: dict(zip(names, session.run(names, inputs)))
        off = lambda inputs: {name: array * 1.02 for name, array in run(inputs).items()}
        wrong = selftest.failures(arrays, model.precision, off)
        print(model.precision, selftest.failures(arrays, model.precision, run), len(wrong))
assert not {"torch", "onnx"} & set(sys.modules)
"""
    done = run_without(tuple(name for name in HEAVY if name not in ("onnxruntime", "google")), script, exported.directory)
    assert done.returncode == 0, done.stderr
    # Three cases (no mask, padded, dead rows) of two outputs each: all right, and all wrong where perturbed by 2 %.
    assert done.stdout.splitlines() == ["fp32 [] 6", "fp16 [] 6", "fp32 [] 6"]


def test_the_public_names_mean_the_same_whatever_was_imported() -> None:
    # A module of a public name's own name would take its place as soon as anything imported it.
    # Not these: one runs inside Triton, and KServe's messages have the names of tritonclient's, which are here already.
    elsewhere = {"triton_front", "endpoints", "guards", "grpc_server", "rest_server"}
    for module in pkgutil.walk_packages(bca_deploy.__path__, "bca_deploy."):
        if module.name.rpartition(".")[2] not in elsewhere:
            importlib.import_module(module.name)
    for name in bca_deploy.__all__:
        assert not isinstance(getattr(bca_deploy, name), ModuleType), name
        assert getattr(bca_deploy, name) is getattr(bca_deploy, name)
    with pytest.raises(AttributeError, match="has no attribute 'expert'; it has BcaError, Bundle, "):
        bca_deploy.expert  # noqa: B018


# ---- the self-test


@pytest.fixture
def arrays(exported: Bundle) -> dict[str, np.ndarray]:
    with np.load(exported.path("selftest.npz"), allow_pickle=False) as file:
        return dict(file)


def answer(arrays: dict[str, np.ndarray], bounds: float, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the true outputs of the fp32 case with these inputs, off by ``bounds`` times what is allowed in one place."""
    place = next(n.removesuffix("/input/x") for n, a in arrays.items() if n.endswith("/input/x") and a is inputs["x"])
    outputs = {name: arrays[f"{place}/output/{name}"].copy() for name in ("out", "context_out")}
    if place == "fp32/dead-rows":
        outputs["context_out"].flat[-1] += bounds * arrays[f"{place}/bound/context_out"]
    return outputs


def test_the_self_test_covers_dead_rows_in_every_precision(arrays: dict[str, np.ndarray]) -> None:
    assert {name.rsplit("/", 2)[0] for name in arrays} == {
        f"{precision}/{case}" for precision in ("fp32", "fp16") for case in ("no-mask", "padded", "dead-rows")
    }
    for name, array in arrays.items():
        kind, tensor = name.split("/")[2:]
        wanted = {"input": "bool" if tensor.endswith("mask") else "float32"}.get(kind, "float64")
        assert array.dtype == wanted, name
        assert np.isfinite(array).all(), name
    assert not arrays["fp32/dead-rows/input/mask"].any(-1).all()


def test_the_self_test_allows_its_bound_and_no_more(arrays: dict[str, np.ndarray]) -> None:
    assert selftest.failures(arrays, "fp32", lambda inputs: answer(arrays, 0.99, inputs)) == []
    failures = selftest.failures(arrays, "fp32", lambda inputs: answer(arrays, 1.01, inputs))
    assert len(failures) == 1
    assert failures[0].startswith("self-test fp32/dead-rows: context_out is off by ")


def test_nan_fails_the_self_test(arrays: dict[str, np.ndarray]) -> None:
    assert len(selftest.failures(arrays, "fp32", lambda inputs: answer(arrays, np.nan, inputs))) == 1


def test_a_self_test_without_cases_of_that_precision_does_not_pass(arrays: dict[str, np.ndarray]) -> None:
    def never(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        raise AssertionError("there is no bf16 case")

    # Nothing tried is nothing proven: an error or a failure, but not an empty list.
    with contextlib.suppress(BcaError, LookupError):
        assert selftest.failures(arrays, "bf16", never)


# ---- the manifest


def test_the_schema_in_the_repository_is_the_manifests(repository: Path) -> None:
    path = repository / "docs" / "manifest.schema.json"
    assert json.loads(path.read_text(encoding="utf-8")) == json_schema()


def test_the_schema_documents_every_field_of_the_manifest() -> None:
    schema: Any = json_schema()
    for name in ("Manifest", "ModelEntry", "ParityEntry", "EngineEntry", "BuildOptions", "FileEntry"):
        table = schema if name == "Manifest" else schema["$defs"][name]
        assert table["additionalProperties"] is False
        undocumented = [key for key, field in table["properties"].items() if "description" not in field and "$ref" not in field]
        assert undocumented == [], name
    for name in ("Signature", "Tensor"):
        table = schema["$defs"][name]
        assert table["additionalProperties"] is False
        assert [key for key in table["properties"] if f"    {key}: " not in table["description"]] == [], name


def test_an_engine_is_of_a_model_and_of_the_dimensions_that_there_are(exported: Bundle) -> None:
    engine: dict[str, Any] = {
        "file": "engines/rtx-fp16.engine", "library": "rtx", "version": "1.7", "model": "models/fp16.onnx",
        "model_sha256": "0" * 64, "precision": "fp16", "targets": ["sm89"], "gpu": None, "profiles": [dict(LAYER_DIMS)],
        "static": False, "matmuls": {}, "weights": {}, "scratch_bytes": None, "weight_bytes": None, "attentions_fused": None,
        "fusion_evidence": "unknown", "options": {},
    }  # fmt: skip
    whole = exported.manifest.model_dump()
    assert Manifest.model_validate(whole | {"engines": [engine]}).engines[0].options == BuildOptions()
    for change, message in (
        ({"model": "models/int8.onnx"}, "was built from models/int8.onnx, which the bundle has not"),
        ({"profiles": [{"batch": LAYER_DIMS["batch"]}]}, "has a profile of batch, not of the signature's dimensions"),
    ):
        with pytest.raises(ValidationError, match=message):
            Manifest.model_validate(whole | {"engines": [engine | change]})


def test_the_manifest_lists_every_file_with_its_hash(exported: Bundle) -> None:
    manifest = Manifest.model_validate_json((exported.directory / "manifest.json").read_text(encoding="utf-8"))
    assert manifest == exported.manifest == read_manifest(exported.directory)
    found = files_of(exported.directory)
    assert set(manifest.files) == set(found) - {"manifest.json", "build.json"}
    assert set(manifest.files) == {
        "expect.npz",
        "models/fp16.onnx",
        "models/fp32.onnx",
        "models/fp32.onnxruntime-cpu.onnx",
        "parity.json",
        "selftest.npz",
        "weights.safetensors",
    }
    for name, entry in manifest.files.items():
        assert (entry.bytes, entry.sha256) == (len(found[name]), sha256(exported.directory / name))


def test_the_manifest_says_what_was_exported(exported: Bundle) -> None:
    manifest = exported.manifest
    assert manifest.format == 1
    assert manifest.layer == make_checkpoint(prenorm=True).spec
    assert manifest.interface == Interface()
    assert manifest.signature == layer_signature(manifest.layer, Interface())
    assert manifest.signature.dims == LAYER_DIMS
    assert manifest.signature.masks == {"x_len": "mask", "context_len": "context_mask"}
    assert [(model.file, model.runtime) for model in manifest.models] == [
        ("models/fp32.onnx", "portable"),  # as asked for
        ("models/fp16.onnx", "portable"),
        ("models/fp32.onnxruntime-cpu.onnx", "onnxruntime-cpu"),
    ]
    assert manifest.engines == ()
    assert {"bca-deploy", "torch", "onnx", "onnxruntime"} <= set(manifest.versions)
    assert all(version[0].isdigit() for version in manifest.versions.values())


@pytest.mark.parametrize("index", [0, 1])
def test_the_manifest_says_of_a_model_what_its_graph_says(exported: Bundle, index: int) -> None:
    entry = exported.manifest.models[index]
    model = onnx.load(exported.path(entry.file))
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", entry.opset)]
    assert len(model.graph.node) == entry.nodes
    signature = signature_of(exported.manifest, entry)
    for listed, values in ((signature.inputs, model.graph.input), (signature.outputs, model.graph.output)):
        graph = []
        for value in values:
            tensor = value.type.tensor_type
            axes = tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)
            graph.append((value.name, np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)).name, axes))
        assert [(t.name, t.dtype, t.axes) for t in listed] == graph


def test_the_manifest_summarises_parity_json(exported: Bundle) -> None:
    reports = json.loads(exported.path("parity.json").read_text(encoding="utf-8"))["models"]
    for entry, report in zip(exported.manifest.models, reports, strict=True):
        assert entry.parity.passed
        assert report["passed"]
        assert entry.parity.scope == report["scope"] == "quick"
        assert entry.parity.cases == report["cases"] >= 40
        assert entry.parity.worst_ratio == report["worst_ratio"] <= 1.5
        assert set(entry.parity.runtimes) == {result["runtime"] for result in report["results"]}


def test_the_weights_are_the_checkpoints_own(exported: Bundle) -> None:
    from safetensors.torch import load_file

    weights, state = load_file(exported.path("weights.safetensors")), make_checkpoint(prenorm=True).state
    assert set(weights) == set(state)
    assert all(weights[name].dtype == state[name].dtype and weights[name].equal(state[name]) for name in state)


@pytest.mark.slow
def test_another_export_of_the_same_input_is_the_same_bundle(exported: Bundle, tmp_path: Path) -> None:
    # As different as can be: another process, hash seed, directory, and the checkpoint as a file through the command line.
    save_file(make_checkpoint(prenorm=True).state, tmp_path / "layer.safetensors")
    command = f"""
        {Path(sys.executable).parent / "bca-export"} --json --checkpoint layer.safetensors --heads 3
        --precision fp32 --precision fp16 --expect {exported.path("expect.npz")} --out another/place/again
    """
    environment = os.environ | {"PYTHONHASHSEED": "77"}
    done = subprocess.run(command.split(), cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert_same_bundle(exported.directory, tmp_path / "another/place/again", proven_alike=False)
    # A real process: nothing but the JSON on standard output, no library's noise on standard error.
    assert json.loads(done.stdout)["passed"] is True
    stages = ["weights", "trace fp32", "parity fp32", "trace fp16", "parity fp16"]
    stages += ["trace fp32.onnxruntime-cpu", "parity fp32.onnxruntime-cpu", "self-test"]
    assert done.stderr.splitlines() == [f"{stage} ..." for stage in stages]


# ---- what the system does not let us read


def denied(name: str) -> Callable[..., Any]:
    """Path.open as it is for another user's private file of that name."""
    real = Path.open

    def opened(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path.name == name:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *args, **kwargs)

    return opened


@pytest.mark.parametrize("name", ["manifest.json", "weights.safetensors", "fp32.onnx"])
def test_a_file_of_another_user_alone_is_named(exported: Bundle, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(Path, "open", denied(name))
    with pytest.raises(BundleError, match=rf"{name} cannot be read: Permission denied; check permissions"):
        Bundle.open(exported.directory)


def test_an_archive_of_another_user_alone_is_named(archive: Path, unpacked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(bundle_module.zipfile, "ZipFile", closed)
    with pytest.raises(BundleError, match=rf"{archive.name} cannot be read: Permission denied"):
        Bundle.open(archive)
    assert list(unpacked.iterdir()) == []


def test_a_disk_that_fills_while_an_archive_is_unpacked_is_told(
    archive: Path, unpacked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "extract", full)
    with pytest.raises(BundleError, match=rf"{archive.name} cannot be read: No space left on device"):
        Bundle.open(archive)
    assert list(unpacked.iterdir()) == []


@pytest.mark.parametrize("call", [Bundle.open, read_manifest, bca_deploy.open, bca_deploy.verify])
def test_a_path_that_the_system_refuses_is_named(tmp_path: Path, call: Callable[[Path], object]) -> None:
    with pytest.raises(BundleError, match=r"x{300}(/manifest\.json)? cannot be read: File name too long"):
        call(tmp_path / ("x" * 300))


@pytest.mark.parametrize("check", ["fast", "FULL", None, 1])
def test_an_unknown_check_is_refused(exported: Bundle, check: Any) -> None:
    with pytest.raises(InputError, match=r"check .* is not known.*; allowed: full, size, off"):
        Bundle.open(exported.directory, check)
