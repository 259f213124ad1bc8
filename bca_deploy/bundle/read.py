"""Open a bundle, a directory or one .bca file, and refuse one that is damaged, unsafe or too new. Needs no torch, no onnx."""

import contextlib
import errno
import hashlib
import json
import math
import os
import stat
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Literal, Self, get_args

from pydantic import ValidationError

from bca_deploy.bundle.manifest import FORMAT, MANIFEST_FILE, FileEntry, Manifest
from bca_deploy.errors import BundleError, check_one_of
from bca_deploy.threads import PrivateDirectory

Check = Literal["full", "size", "off"]

#: What an archive may unpack to, so that a small file cannot fill the disk.
ARCHIVE_LIMIT_BYTES = 64 * 2**30
#: Bytes of one part of a path, and of all of it, beyond which no file system has it.
LONGEST_NAME, LONGEST_PATH = 255, 4096


class Bundle:
    """An opened bundle.

    Attributes:
        source: what was opened.
        directory: where the files are; for an archive a private temporary directory that goes when the bundle is closed.
        manifest: the parsed manifest.

    A context manager: leaving it removes what was unpacked.
    """

    def __init__(self, source: Path, manifest: Manifest, unpacked: PrivateDirectory | None = None) -> None:
        self.source = source
        self.directory = unpacked.path if unpacked else source
        self.manifest = manifest
        self._unpacked = unpacked

    @classmethod
    def open(cls, path: str | Path, check: Check = "full") -> "Bundle":
        """Open and check a bundle.

        Args:
            path: the directory, or a ``.bca`` archive.
            check: ``full`` compares every file's hash, ``size`` only sizes, ``off`` neither.

        Returns:
            The bundle.

        Raises:
            BundleError: not a bundle, damaged or unreadable (the file is named), unsafe, or of a newer format.
            InputError: an unknown ``check``.
        """
        check_one_of("check", check, get_args(Check))
        path = Path(path)
        with reading(path):
            unpacked = _unpack(path) if path.is_file() else None
            try:
                directory = unpacked.path if unpacked else path
                manifest = read_manifest(directory, path)
                for name, entry in manifest.files.items():
                    _check_file(directory, name, entry, check)
            except BaseException:
                if unpacked:
                    unpacked.close()
                raise
        return cls(path, manifest, unpacked)

    def path(self, name: str) -> Path:
        """Return the path of a file that the manifest lists.

        Raises:
            BundleError: the manifest does not list it.
        """
        if name not in self.manifest.files:
            raise BundleError(f"the bundle has no {shortened(name)}; it has {', '.join(sorted(self.manifest.files))}")
        return self.directory / name

    def close(self) -> None:
        """Remove what was unpacked from an archive."""
        if self._unpacked:
            self._unpacked.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what the system says about a file into a :class:`BundleError` that names it, or else ``path``."""
    try:
        yield
    except OSError as error:
        place = error.filename or path
        raise BundleError(f"{place} cannot be read: {error.strerror or error}; check permissions, links and disk") from error


def is_bundle(directory: Path) -> bool:
    """Whether the directory holds a manifest; it may still be damaged.

    Raises:
        BundleError: the system does not say.
    """
    with reading(directory):
        return _size_of(directory / MANIFEST_FILE) is not None


def read_manifest(directory: Path, shown: Path | None = None) -> Manifest:
    """Read the manifest alone.

    Raises:
        BundleError: missing, unreadable, a link that leads out of the bundle, or of a newer format.
    """
    path = directory / MANIFEST_FILE
    shown = shown or directory
    if not is_bundle(directory):
        with reading(directory):
            raise BundleError(f"{shown} is not a bundle: it has no {MANIFEST_FILE}; {_way_to_one(directory, shown)}")
    try:
        with reading(path):
            text = safe_path(directory, MANIFEST_FILE).read_text(encoding="utf-8")
        _check_format(json.loads(text, parse_constant=_finite, parse_float=_finite), shown)
        return Manifest.model_validate_json(text, strict=True)  # C++ takes no "1" and no 1.0 for 1 either
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            raise BundleError(f"{path} is not JSON ({first['msg']}); export the bundle again") from error
        where = ".".join(map(str, first["loc"]))
        raise BundleError(f"{path}: field {where}: {first['msg']}; export the bundle again") from error
    except (ValueError, RecursionError) as error:  # numbers and depths without end, too
        raise BundleError(f"{path} is not JSON ({error}); export the bundle again") from error


def _way_to_one(directory: Path, shown: Path) -> str:
    """Return what to do about a folder that is no bundle: the bundle may be below it or above it."""
    if shown != directory:
        return f"make one with bca-export --archive {shown}"
    inside = sorted(path for path in directory.iterdir() if (path / MANIFEST_FILE).is_file()) if directory.is_dir() else []
    if inside:
        return f"bundles are in it: {', '.join(map(str, inside[:8]))}"
    if (directory.parent / MANIFEST_FILE).is_file():
        return f"it is in the bundle {directory.parent}"
    own = directory / "model" if directory.is_dir() and any(directory.iterdir()) else directory  # --out takes no other folder
    return f"make one with bca-export --out {own}"


def _finite(number: str) -> float:
    """Read a number as JSON has them: Python takes NaN, Infinity and 1e400, too."""
    if not math.isfinite(value := float(number)):
        raise ValueError(f"{number} is not a finite number")
    return value


def _check_format(content: Any, directory: Path) -> None:
    found = content.get("format") if isinstance(content, dict) else None
    if isinstance(found, int | float) and found > FORMAT:
        raise BundleError(
            f"{directory} is a bundle of format {found}, newer than the formats this version reads (up to {FORMAT}); "
            "upgrade: pip install -U bca-deploy"
        )


def _check_file(directory: Path, name: str, entry: FileEntry, check: Check) -> None:
    path = safe_path(directory, name)
    size = _size_of(path)
    if size is None:
        raise BundleError(f"{name} is missing from {directory}; copy or export the bundle again")
    if check == "off":
        return
    if size != entry.bytes:
        raise BundleError(f"{name} has {size} bytes, the manifest says {entry.bytes}; copy or export the bundle again")
    if check == "full" and sha256(path) != entry.sha256:
        raise BundleError(
            f"{name} has changed since the export (its sha256 differs from the manifest's); export the bundle again"
        )


def _size_of(path: Path) -> int | None:
    """Return the size in bytes of a file, or None where there is none. What else the system says is the caller's."""
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def safe_path(directory: Path, name: str) -> Path:
    """Return ``directory / name``.

    Raises:
        BundleError: the name is absolute, climbs out, is too long for any system, or is a link that leads out of the directory.
        OSError: it is a link that leads to itself.
    """
    pure = PurePosixPath(name)
    if len(os.fsencode(name)) > LONGEST_PATH or any(len(os.fsencode(part)) > LONGEST_NAME for part in pure.parts):
        raise BundleError(f"no system has a file named {shortened(name)}; do not use this bundle")
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name or not pure.parts:
        raise BundleError(
            f"unsafe path {name!r}: files of a bundle are named relative to it, without '..'; do not use this bundle"
        )
    path = directory / name
    if not _resolved(path).is_relative_to(directory.resolve()):
        raise BundleError(
            f"unsafe path {name!r}: it is a link that leads out of the bundle; do not use this bundle, or if you know where "
            "its links lead, copy it with the files in their places: cp -rL"
        )
    return path


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except RuntimeError as error:  # what Python before 3.13 makes of a link that leads to itself
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path)) from error


def shortened(name: str) -> str:
    """Return a name as errors show it: of a long one the beginning, and how long it is."""
    return name if len(name) <= LONGEST_NAME else f"{name[:40]}... ({len(name)} characters)"


def sha256(path: Path) -> str:
    """Return the file's SHA-256 as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _unpack(path: Path) -> PrivateDirectory:
    """Unpack an archive into a private directory; the caller cleans it up."""
    target = PrivateDirectory("bca-bundle-")
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if sum(member.file_size for member in members) > ARCHIVE_LIMIT_BYTES:
                raise BundleError(f"{path} unpacks to more than {ARCHIVE_LIMIT_BYTES} bytes; unpack it by hand if you trust it")
            for member in members:
                safe_path(target.path, member.filename)
                archive.extract(member, target.path)
    except (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError) as error:  # NotImplementedError is a RuntimeError
        target.close()
        raise BundleError(f"{path} is neither a bundle directory nor a readable .bca archive: {error}") from error
    except BaseException:
        target.close()
        raise
    return target
