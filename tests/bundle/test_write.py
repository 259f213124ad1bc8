"""Publishing: whole or not at all, one writer at a time, and nobody else's file is lost."""

import errno
import os
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.bundles import contents, untouched
from support.layers import make_spec

from bca_deploy.bundle import write
from bca_deploy.bundle.manifest import FileEntry, LayerEntry, Manifest, ModelEntry, ParityEntry
from bca_deploy.bundle.read import Bundle, sha256
from bca_deploy.bundle.write import staged
from bca_deploy.errors import BundleError
from bca_deploy.spec import Interface, layer_signature

# A writer in a process of its own: says that it is inside, and stays there until it is told to go on.
WRITER = """
import sys
from pathlib import Path
from bca_deploy.errors import BundleError
from bca_deploy.bundle.write import staged
try:
    with staged(Path(sys.argv[1])) as directory:
        (directory / "half").write_text("written")
        print("inside", flush=True)
        sys.stdin.read()
except BundleError as error:
    print(f"refused: {error}", flush=True)
"""


def fill(directory: Path, **files: str) -> None:
    """Write a bundle that is one in every way but that its model is text; keywords are files of ``models/``."""
    for name, text in {"model": "the model", **files}.items():
        path = directory / "models" / f"{name}.onnx"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    listed = [p for p in sorted(directory.rglob("*")) if p.is_file()]
    manifest = Manifest(
        format=1,
        layers=(LayerEntry(path="", spec=make_spec(), lowering="fused"),),
        interface=Interface(),
        signature=layer_signature(make_spec(), Interface()),
        models=(
            ModelEntry(
                file="models/model.onnx",
                runtime="portable",
                opset=17,
                precision="fp32",
                lowering="fused",
                keep_io_types=True,
                nodes=1,
                external_data=None,
                parity=ParityEntry(passed=True, scope="quick", cases=40, runtimes=("onnxruntime",), worst_ratio=1.0),
            ),
        ),
        engines=(),
        versions={},
        files={p.relative_to(directory).as_posix(): FileEntry(bytes=p.stat().st_size, sha256=sha256(p)) for p in listed},
    )
    (directory / "manifest.json").write_text(manifest.model_dump_json(), encoding="utf-8")
    (directory / "build.json").write_text("{}", encoding="utf-8")


def publish(out: Path, force: bool = False, **files: str) -> None:
    with staged(out, force) as directory:
        fill(directory, **files)


def fail_inside(out: Path, error: BaseException, force: bool = False, **files: str) -> None:
    """Fill the staging directory, then fail."""
    with staged(out, force) as directory:
        fill(directory, **files)
        raise error


def full_disk(*args: object, **kwargs: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@contextmanager
def writer(out: Path) -> Iterator[subprocess.Popen[str]]:
    """A second process that has said its first line: it is inside, or was refused."""
    command = [sys.executable, "-c", WRITER, str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


# ---- whole or not at all


@pytest.mark.parametrize("name", ["model", "model.bca"])
def test_a_bundle_appears_whole_when_the_block_ends(tmp_path: Path, name: str) -> None:
    out = tmp_path / name
    with staged(out) as directory:
        fill(directory)
        assert directory.parent == tmp_path  # beside it: on the same file system, so that it can be renamed
        assert not out.exists()
    assert [path.name for path in tmp_path.iterdir()] == [name]
    with Bundle.open(out) as bundle:
        assert bundle.path("models/model.onnx").read_text() == "the model"


@pytest.mark.parametrize("name", ["model", "model.bca"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, BundleError])
def test_a_block_that_fails_leaves_nothing(tmp_path: Path, name: str, error: type[BaseException]) -> None:
    with pytest.raises(error, match="half way"):
        fail_inside(tmp_path / name, error("half way"))
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("name", ["model", "model.bca"])
def test_a_replacement_that_fails_leaves_the_old_bundle(tmp_path: Path, name: str) -> None:
    publish(tmp_path / name, model="old")
    with untouched(tmp_path), pytest.raises(KeyboardInterrupt):
        fail_inside(tmp_path / name, KeyboardInterrupt(), force=True, model="new")


def test_missing_parents_are_made(tmp_path: Path) -> None:
    publish(tmp_path / "build" / "deep" / "model")
    assert Bundle.open(tmp_path / "build" / "deep" / "model").manifest.format == 1


def test_parents_that_were_made_go_with_a_failure(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fail_inside(tmp_path / "build" / "deep" / "model", KeyboardInterrupt())
    assert contents(tmp_path) == {}


def test_parents_that_were_there_stay(tmp_path: Path) -> None:
    (tmp_path / "build").mkdir()
    with pytest.raises(KeyboardInterrupt):
        fail_inside(tmp_path / "build" / "model", KeyboardInterrupt())
    assert contents(tmp_path) == {"build": "a directory"}


@pytest.mark.parametrize("name", ["model", "model.bca"])
def test_a_published_bundle_obeys_the_umask(tmp_path: Path, name: str) -> None:
    # The staging directory is private; what comes of it must be as readable as anything else the user makes.
    before = os.umask(0o022)
    try:
        publish(tmp_path / name)
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(before)
    assert (tmp_path / name).stat().st_mode & 0o777 == (0o644 if name.endswith(".bca") else 0o755)


@pytest.mark.parametrize(("name", "step"), [("model.bca", "copyfileobj"), ("model", "copy2")])
def test_a_disk_that_fills_while_publishing_leaves_the_old_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, step: str
) -> None:
    publish(tmp_path / name, model="old")
    if name == "model":
        (tmp_path / name / "notes.txt").write_text("mine")
    monkeypatch.setattr(write.shutil, step, full_disk)
    with untouched(tmp_path), pytest.raises(OSError, match="No space left"):
        publish(tmp_path / name, force=True, model="new")
    monkeypatch.undo()
    Bundle.open(tmp_path / name).close()


def test_a_disk_that_fills_while_writing_leaves_the_old_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(tmp_path / "model", model="old")
    monkeypatch.setattr(Path, "write_text", full_disk)
    with untouched(tmp_path), pytest.raises(OSError, match="No space left"):
        publish(tmp_path / "model", force=True, model="new")


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_swap_that_fails_half_way_puts_the_old_bundle_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    publish(tmp_path / "model", model="old")
    monkeypatch.setattr(
        "bca_deploy.bundle.write._exchange", lambda one, other: False
    )  # a file system without the one-step swap
    rename = Path.rename

    def second_fails(self: Path, target: Path) -> Path:
        if "partial" in self.name:
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", second_fails)
    with untouched(tmp_path), pytest.raises(type(error)):
        publish(tmp_path / "model", force=True, model="new")


# ---- one writer at a time


def test_a_second_process_is_refused_while_one_writes(tmp_path: Path) -> None:
    with staged(tmp_path / "model") as directory:
        with writer(tmp_path / "model") as second:
            assert first_line(second).startswith(f"refused: another process is writing {tmp_path / 'model'}; wait for it")
        fill(directory)
    assert list(contents(tmp_path / "model")) == ["build.json", "manifest.json", "models", "models/model.onnx"]


def test_a_refused_writer_does_not_break_the_lock(tmp_path: Path) -> None:
    out = tmp_path / "model"
    with staged(out) as directory:
        for _ in range(2):
            with pytest.raises(BundleError, match="another process is writing"), staged(out):
                pytest.fail("two writers at once")
        assert directory.is_dir()
        fill(directory)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_two_bundles_side_by_side_do_not_wait_for_each_other(tmp_path: Path) -> None:
    with staged(tmp_path / "a") as first, staged(tmp_path / "b") as second:
        fill(first)
        fill(second)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_writers_that_race_never_meet_and_leave_no_lock(tmp_path: Path) -> None:
    out, inside, failures, published = tmp_path / "model", threading.Lock(), [], []

    def write(number: int) -> None:
        for turn in range(60):
            try:
                with staged(out, force=True) as directory:
                    if not inside.acquire(blocking=False):
                        failures.append("two writers at once")
                    try:
                        fill(directory, model=f"{number}.{turn}")
                    finally:
                        inside.release()
                published.append(number)
            except BundleError as error:
                if "another process" not in str(error):
                    failures.append(str(error))
                time.sleep(0.001)
            except Exception as error:  # a race shows as whatever the file system says
                failures.append(repr(error))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert published
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    Bundle.open(out).close()


def test_a_killed_writers_lock_and_files_do_not_stop_the_next(tmp_path: Path) -> None:
    with writer(tmp_path / "model") as first:
        assert first_line(first) == "inside\n"
        first.kill()
        first.wait()
    left = [path.name for path in tmp_path.iterdir()]
    assert sorted(name.split("-")[0] for name in left) == [".model.lock", ".model.partial"]  # or the test shows nothing
    publish(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# ---- what a killed writer left


def test_a_partial_directory_of_a_killed_writer_goes(tmp_path: Path) -> None:
    fill(tmp_path / ".model.partial-abc")
    with staged(tmp_path / "model") as directory:
        assert sorted(path.name for path in tmp_path.iterdir()) == [".model.lock", directory.name]
        fill(directory)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_old_bundle_that_was_replaced_but_not_removed_goes(tmp_path: Path) -> None:
    publish(tmp_path / "model", model="current")
    fill(tmp_path / ".model.old-77", model="old")
    publish(tmp_path / "model", force=True, model="next")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model/models/model.onnx").read_text() == "next"


def killed_between_the_renames(tmp_path: Path) -> None:
    """The old bundle is aside and the new one not in its place yet."""
    fill(tmp_path / ".model.old-77", model="old")
    fill(tmp_path / ".model.partial-abc", model="new")


def test_a_bundle_that_a_killed_writer_had_moved_aside_comes_back(tmp_path: Path) -> None:
    killed_between_the_renames(tmp_path)
    with pytest.raises(ValueError, match="half way"):
        fail_inside(tmp_path / "model", ValueError("half way"), force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model/models/model.onnx").read_text() == "old"


def test_a_bundle_that_came_back_needs_force_like_any_other(tmp_path: Path) -> None:
    killed_between_the_renames(tmp_path)
    with pytest.raises(BundleError, match="already holds a bundle; use --force"):
        publish(tmp_path / "model", model="newer")
    assert (tmp_path / "model/models/model.onnx").read_text() == "old"


def test_files_of_a_bundle_whose_name_begins_alike_are_left_alone(tmp_path: Path) -> None:
    # ".model.old-2.partial-x" is what a running export to "model.old-2" writes in; it is no leftover of "model".
    with staged(tmp_path / "model.old-2") as directory:
        fill(directory, model="of the other")
        publish(tmp_path / "model")
        assert directory.is_dir()
    for name, text in {"model.old-2": "of the other", "model": "the model"}.items():
        assert (tmp_path / name / "models/model.onnx").read_text() == text


def test_leftovers_go_whatever_characters_the_name_holds(tmp_path: Path) -> None:
    fill(tmp_path / ".model[1].partial-abc")
    publish(tmp_path / "model[1]")
    assert [path.name for path in tmp_path.iterdir()] == ["model[1]"]


# ---- what may be replaced


@pytest.mark.parametrize("name", ["model", "model.bca"])
def test_an_existing_bundle_needs_force(tmp_path: Path, name: str) -> None:
    publish(tmp_path / name, model="old")
    with untouched(tmp_path), pytest.raises(BundleError, match="already holds a bundle; use --force to replace it"):
        publish(tmp_path / name, model="new")
    publish(tmp_path / name, force=True, model="new")
    with Bundle.open(tmp_path / name) as bundle:
        assert bundle.path("models/model.onnx").read_text() == "new"


def test_an_empty_directory_is_filled(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    publish(tmp_path / "model")
    Bundle.open(tmp_path / "model").close()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_force_removes_the_listed_files_and_no_others(tmp_path: Path) -> None:
    out = tmp_path / "model"
    publish(out, model="old", gone="listed")
    (out / "notes.txt").write_text("mine")
    (out / "models" / "mine.txt").write_text("mine too")
    (out / "plots" / "deep").mkdir(parents=True)
    (out / "plots" / "deep" / "a.svg").write_text("<svg/>")
    (out / "link").symlink_to("notes.txt")
    (out / "dangling").symlink_to("nowhere")
    (out / ".hidden").write_text("h")
    publish(out, force=True, model="new")
    found = contents(out)
    assert {name for name, text in found.items() if text != "a directory"} == {
        ".hidden",
        "build.json",
        "dangling",
        "link",
        "manifest.json",
        "models/mine.txt",
        "models/model.onnx",
        "notes.txt",
        "plots/deep/a.svg",
    }
    assert found["models/model.onnx"] == "new"
    assert (found["notes.txt"], found["link"], found["dangling"]) == ("mine", "-> notes.txt", "-> nowhere")
    Bundle.open(out).close()


def test_force_keeps_an_empty_directory_of_the_users(tmp_path: Path) -> None:
    publish(tmp_path / "model")
    (tmp_path / "model" / "plots").mkdir()
    publish(tmp_path / "model", force=True)
    assert (tmp_path / "model" / "plots").is_dir()


def test_a_users_file_where_the_new_bundle_has_one_is_refused(tmp_path: Path) -> None:
    publish(tmp_path / "model")
    (tmp_path / "model" / "models" / "fp16.onnx").write_text("mine")
    with untouched(tmp_path), pytest.raises(BundleError, match=r"models/fp16\.onnx is not the old bundle's.*move it away"):
        publish(tmp_path / "model", force=True, fp16="new")


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("name", ["thesis.tex", ".git"])
def test_another_directory_is_refused_before_any_work(tmp_path: Path, force: bool, name: str) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / name).write_text("years of work")
    message = "is not a bundle; it is never touched, with --force either: choose another --out"
    with untouched(tmp_path), pytest.raises(BundleError, match=message), staged(tmp_path / "model", force):
        pytest.fail("the work began")


# A web app or a browser extension has a manifest.json too; and what a bundle that cannot be read lists, nobody knows.
@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("manifest", ['{"manifest_version": 3, "name": "an extension"}', "not JSON", '{"format": 2}'])
def test_a_directory_with_a_foreign_manifest_is_refused_before_any_work(tmp_path: Path, force: bool, manifest: str) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "manifest.json").write_text(manifest)
    (tmp_path / "model" / "index.html").write_text("years of work")
    with (
        untouched(tmp_path),
        pytest.raises(BundleError, match=r"is not a bundle|manifest\.json|format 2, newer") as caught,
        staged(tmp_path / "model", force),
    ):
        pytest.fail("the work began")
    assert "use --force to replace it" not in str(caught.value)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("name", ["model", "model.bca"])
def test_another_file_is_refused_before_any_work(tmp_path: Path, name: str, force: bool) -> None:
    (tmp_path / name).write_text("years of work")
    with untouched(tmp_path), pytest.raises(BundleError, match="is not a bundle; it is never touched"):
        publish(tmp_path / name, force)


def test_a_zip_that_is_no_bundle_is_not_replaced(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "photos.bca", "w") as archive:
        archive.writestr("photo.jpg", "years of photos")
    with untouched(tmp_path), pytest.raises(BundleError, match="is not a bundle; it is never touched"):
        publish(tmp_path / "photos.bca", force=True)


def test_a_link_to_nowhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to("nowhere")
    with untouched(tmp_path), pytest.raises(BundleError, match="is not a bundle"):
        publish(tmp_path / "model", force=True)


def test_a_link_to_a_bundle_is_refused_or_replaced_cleanly(tmp_path: Path) -> None:
    publish(tmp_path / "real", model="old")
    (tmp_path / "model").symlink_to("real")
    try:
        publish(tmp_path / "model", force=True, model="new")
    except BundleError:
        expected = "old"
    else:
        expected = "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "real"]
    assert (tmp_path / "model/models/model.onnx").read_text() == expected


def test_a_link_stands_for_the_bundle_that_it_leads_to_and_stays(tmp_path: Path) -> None:
    publish(tmp_path / "real", model="old")
    (tmp_path / "model").symlink_to("real")
    with pytest.raises(BundleError, match="real already holds a bundle; use --force to replace it"):
        publish(tmp_path / "model", model="new")
    publish(tmp_path / "model", force=True, model="new")
    assert (tmp_path / "model").is_symlink()
    assert (tmp_path / "real/models/model.onnx").read_text() == "new"


def test_a_link_to_an_empty_directory_stands_for_it_and_one_to_work_is_not_touched(tmp_path: Path) -> None:
    for name in ("empty", "thesis"):
        (tmp_path / name).mkdir()
        (tmp_path / f"to-{name}").symlink_to(name)
    (tmp_path / "thesis/thesis.tex").write_text("years of work")
    publish(tmp_path / "to-empty", model="new")
    assert (tmp_path / "empty/models/model.onnx").read_text() == "new"
    with untouched(tmp_path), pytest.raises(BundleError, match="thesis exists and is not a bundle; it is never touched"):
        publish(tmp_path / "to-thesis", force=True)


@pytest.mark.parametrize("kind", ["empty", "bundle"])
def test_a_directory_where_an_archive_should_go_is_refused_before_any_work(tmp_path: Path, kind: str) -> None:
    (tmp_path / "model.bca").mkdir()
    if kind == "bundle":
        fill(tmp_path / "model.bca")
    with (
        untouched(tmp_path),
        pytest.raises(BundleError, match=r"model\.bca .*directory"),
        staged(tmp_path / "model.bca", force=True),
    ):
        pytest.fail("the work began")


# ---- archives


def test_an_archive_of_equal_content_is_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with staged(tmp_path / "a" / "one.bca") as directory:
        fill(directory, x="1", y="2")
    listing = Path.rglob  # a file system lists its files in whatever order it likes
    monkeypatch.setattr(Path, "rglob", lambda path, pattern: reversed(list(listing(path, pattern))))
    with staged(tmp_path / "b" / "two.bca") as directory:
        (directory / "models").mkdir()
        (directory / "models" / "y.onnx").write_text("2")  # another order, time and mode
        fill(directory, x="1")
        for path in directory.rglob("*"):
            os.utime(path, (1e9, 1e9))
        (directory / "models" / "x.onnx").chmod(0o600)
    assert (tmp_path / "a" / "one.bca").read_bytes() == (tmp_path / "b" / "two.bca").read_bytes()


def test_an_archive_of_other_content_is_not_equal(tmp_path: Path) -> None:
    publish(tmp_path / "one.bca", model="1")
    publish(tmp_path / "two.bca", model="2")
    assert (tmp_path / "one.bca").read_bytes() != (tmp_path / "two.bca").read_bytes()


def test_an_archive_holds_exactly_the_files_and_other_tools_read_it(tmp_path: Path) -> None:
    publish(tmp_path / "model.bca", data="x" * 100_000)
    publish(tmp_path / "model", data="x" * 100_000)
    shutil.unpack_archive(tmp_path / "model.bca", tmp_path / "unpacked", "zip")
    assert contents(tmp_path / "unpacked") == contents(tmp_path / "model")
    with zipfile.ZipFile(tmp_path / "model.bca") as archive:
        assert archive.testzip() is None
        # Stored, so that an .onnx inside could be mapped, and so that the bytes depend on no zlib version.
        assert {member.compress_type for member in archive.infolist()} == {zipfile.ZIP_STORED}
        assert {member.external_attr >> 16 for member in archive.infolist()} == {0o644}


# ---- modes: everything is as readable as what the user makes by hand


def modes(directory: Path) -> dict[str, set[int]]:
    """The modes of all files and of all directories."""
    paths = [directory, *directory.rglob("*")]
    return {
        "files": {path.stat().st_mode & 0o7777 for path in paths if path.is_file()},
        "directories": {path.stat().st_mode & 0o7777 for path in paths if path.is_dir()},
    }


def ordinary(place: Path) -> dict[str, set[int]]:
    (place / "ordinary").mkdir()
    (place / "ordinary" / "file").write_text("")
    return modes(place / "ordinary")


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_what_a_library_wrote_for_its_own_user_alone_gets_the_umasks_mode(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        with staged(tmp_path / "model") as directory:
            (directory / "models").mkdir(mode=0o700)
            os.close(os.open(directory / "models" / "private", os.O_CREAT | os.O_WRONLY, 0o600))
            assert (tmp_path / ".model.lock").stat().st_mode & 0o777 == 0o666 & ~mask
        assert modes(tmp_path / "model") == ordinary(tmp_path)
    finally:
        os.umask(before)


def test_the_umask_is_not_touched_which_is_every_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("another thread's files would get this mode"))
    publish(tmp_path / "model")
    publish(tmp_path / "model.bca")


def test_every_file_of_an_exported_bundle_is_as_readable_as_any_other(exported: Bundle, tmp_path: Path) -> None:
    assert modes(exported.directory) == ordinary(tmp_path)


def test_a_bundle_that_was_changed_stays_readable(exported: Bundle, tmp_path: Path) -> None:
    shutil.copytree(exported.directory, tmp_path / "model")
    with write.revised(tmp_path / "model") as (_, directory):
        (directory / "weights.safetensors").chmod(0o600)
    assert modes(tmp_path / "model") == ordinary(tmp_path)


def test_a_users_own_file_keeps_its_mode(tmp_path: Path) -> None:
    publish(tmp_path / "model")
    (tmp_path / "model" / "secret").write_text("mine")
    (tmp_path / "model" / "secret").chmod(0o600)
    publish(tmp_path / "model", force=True)
    assert (tmp_path / "model" / "secret").stat().st_mode & 0o777 == 0o600
