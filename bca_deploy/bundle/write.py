"""Put a bundle in its place: staged beside it, one writer at a time, swapped in whole or not at all."""

import contextlib
import ctypes
import fcntl
import json
import os
import re
import shutil
import stat
import time
import uuid
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bca_deploy.bundle.manifest import BUILD_FILE, MANIFEST_FILE, FileEntry, Manifest
from bca_deploy.bundle.read import Bundle, is_bundle, read_manifest, sha256
from bca_deploy.errors import BundleError


@contextlib.contextmanager
def staged(out: Path, force: bool = False) -> Iterator[Path]:
    """Give a private directory to fill; it becomes ``out`` when the block ends well, and vanishes when it does not.

    Args:
        out: the bundle's directory, or its archive where the name ends in ``.bca``; a link is what it leads to.
        force: replace an existing bundle: only the files its manifest lists go, anything else stays.

    Raises:
        BundleError: ``out`` exists and may not be replaced, or another process is writing it.
    """
    out = _followed(out)
    with _parents(out.parent), _locked(out):
        _remove_leftovers(out)
        check_target(out, force)
        staging = out.parent / f".{out.name}.partial-{uuid.uuid4().hex}"
        try:  # from here on: a signal may come between any two lines
            staging.mkdir(mode=0o700)
            yield staging
            _publish(staging, out)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def revised(path: Path) -> Iterator[tuple[Bundle, Path]]:
    """Give an existing bundle, and a private copy of its files to change; the copy takes its place when the block ends well.

    The bundle is read under the writer's lock, so that nobody's change gets lost.

    Args:
        path: the bundle's directory or archive.

    Raises:
        BundleError: it is no whole bundle, or another process is writing it.
    """
    if not path.is_file():
        read_manifest(path)  # a better message than that of a target that is no bundle
    with staged(path, force=True) as directory, Bundle.open(path) as bundle:
        _copy(bundle, directory)
        yield bundle, directory


def _copy(bundle: Bundle, directory: Path) -> None:
    for name in (*bundle.manifest.files, BUILD_FILE):
        source, target = bundle.directory / name, directory / name
        if source.exists():  # build.json may have been left out
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)


def seal(directory: Path, manifest: Manifest) -> Manifest:
    """Write the manifest over the files that lie in a staging directory.

    Returns:
        The manifest with each file's size and hash.
    """
    unlisted = {MANIFEST_FILE, BUILD_FILE}
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    files = {
        name: FileEntry(bytes=path.stat().st_size, sha256=sha256(path))
        for path in paths
        if (name := path.relative_to(directory).as_posix()) not in unlisted
    }
    sealed = manifest.model_copy(update={"files": files})
    (directory / MANIFEST_FILE).write_text(sealed.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return sealed


def write_build(directory: Path, changes: dict[str, Any]) -> None:
    """Add to build.json, which holds all that may differ between two builds of the same."""
    path = directory / BUILD_FILE
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    merged = {k: before[k] | v if isinstance(v, dict) and k in before else v for k, v in changes.items()}
    write_json(path, before | merged | {"finished_unix_s": round(time.time(), 3)})


def write_json(path: Path, content: Any) -> None:
    """Write JSON that every reader takes: it has no NaN or Infinity, so they become strings."""
    safe = json.loads(json.dumps(content), parse_constant=str)
    path.write_text(json.dumps(safe, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _followed(out: Path) -> Path:
    """Return what a link leads to; a link to nowhere stays one, and is refused."""
    return out.resolve() if out.is_symlink() and out.exists() else out


def check_target(out: Path, force: bool) -> None:
    """Refuse a target that may not be written.

    Raises:
        BundleError: it exists and is no bundle, or is one and ``force`` is not given.
    """
    out = _followed(out)
    if not out.exists() and not out.is_symlink():
        return
    if out.is_dir() and not out.is_symlink():
        if out.suffix == ".bca":
            raise BundleError(f"{out} is a directory, and an archive of that name is to be made; choose another name")
        if not any(out.iterdir()):
            return
    if out.is_symlink() or not _replaceable(out):
        raise BundleError(f"{out} exists and is not a bundle; it is never touched, with --force either: choose another --out")
    if not force:
        raise BundleError(f"{out} already holds a bundle; use --force to replace it, or choose another --out")


def _replaceable(out: Path) -> bool:
    if out.is_dir():
        if is_bundle(out):
            read_manifest(out)  # raises where it is damaged: nobody knows then which files are the bundle's
        return is_bundle(out)
    if out.suffix != ".bca" or not zipfile.is_zipfile(out):
        return False
    with zipfile.ZipFile(out) as archive:
        return MANIFEST_FILE in archive.namelist()


@contextlib.contextmanager
def _parents(directory: Path) -> Iterator[None]:
    """Make the directory and its parents; take those that were made away again if nothing came of it."""
    made = [place for place in (directory, *directory.parents) if not place.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for place in made:
            with contextlib.suppress(OSError):  # somebody else has put something there
                place.rmdir()
        raise


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    path = out.parent / f".{out.name}.lock"
    # For reading, which is enough for a lock: one that another user's killed writer has left stops nobody.
    handle = os.open(path, os.O_CREAT | os.O_RDONLY, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The holder before us unlinks the file as it leaves: a lock on an unlinked file keeps nobody out.
        if not path.exists() or path.stat().st_ino != os.fstat(handle).st_ino:
            raise BlockingIOError
    except BlockingIOError:
        os.close(handle)
        raise BundleError(f"another process is writing {out}; wait for it, or choose another --out") from None
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def _remove_leftovers(out: Path) -> None:
    """Clean up after a writer that was killed: the lock is ours, so nobody is using these."""
    for old in _leftovers(out, "old"):
        if not out.exists():
            old.rename(out)  # killed between the two renames of a replacement
        else:
            shutil.rmtree(old, ignore_errors=True)
    for partial in _leftovers(out, "partial"):
        shutil.rmtree(partial, ignore_errors=True)


def _leftovers(out: Path, kind: str) -> list[Path]:
    pattern = re.compile(re.escape(f".{out.name}.{kind}-") + r"[a-z0-9_]+")
    return [path for path in out.parent.iterdir() if pattern.fullmatch(path.name) and path.is_dir()]


def _publish(staging: Path, out: Path) -> None:
    _open_up(staging)
    if out.suffix == ".bca":
        _publish_archive(staging, out)
        return
    if not out.is_dir():
        staging.rename(out)
        return
    _keep_unlisted(out, staging)
    if _exchange(staging, out):
        return  # the old bundle lies in the staging directory now, and goes with it
    old = out.parent / f".{out.name}.old-{os.getpid()}"
    out.rename(old)
    try:
        staging.rename(out)
    except BaseException:
        old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _open_up(staging: Path) -> None:
    """Give everything the mode that open() and mkdir() give here: some libraries write for their own user alone.

    The modes are tried out, and not asked for: os.umask cannot be read without setting it, for every thread of the process.
    """
    probe = staging / ".probe"
    probe.mkdir()
    (probe / "file").touch()
    directories, files = (stat.S_IMODE(path.stat().st_mode) for path in (probe, probe / "file"))
    shutil.rmtree(probe)
    for path in (staging, *staging.rglob("*")):
        path.chmod(directories if path.is_dir() else files)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two directories in one step, so that a process killed at any moment leaves a whole bundle; False where impossible.

    renameat2 with RENAME_EXCHANGE, Linux 3.15 and glibc 2.28: https://man7.org/linux/man-pages/man2/rename.2.html
    """
    at_fdcwd, rename_exchange = -100, 2
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    return rename is not None and rename(at_fdcwd, os.fsencode(one), at_fdcwd, os.fsencode(other), rename_exchange) == 0


def _keep_unlisted(out: Path, staging: Path) -> None:
    """Copy what the old manifest does not list, so that a replacement never loses a user's file."""
    listed = {MANIFEST_FILE, BUILD_FILE}
    if is_bundle(out):
        listed |= set(read_manifest(out).files)
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out)
        if path.is_dir() and not path.is_symlink() and not any(path.iterdir()):
            (staging / name).mkdir(parents=True, exist_ok=True)
        if (path.is_symlink() or not path.is_dir()) and name.as_posix() not in listed:
            target = staging / name
            if target.exists():
                raise BundleError(f"{path} is not the old bundle's, and the new bundle has a file of that name; move it away")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target, follow_symlinks=False)


def _publish_archive(staging: Path, out: Path) -> None:
    partial = staging / ".archive"
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(p for p in staging.rglob("*") if p.is_file() and p != partial):
            # A fixed date: the same bundle is the same archive.
            info = zipfile.ZipInfo(path.relative_to(staging).as_posix())
            info.external_attr = 0o644 << 16
            with path.open("rb") as source, archive.open(info, "w", force_zip64=True) as target:
                shutil.copyfileobj(source, target)
    partial.replace(out)
