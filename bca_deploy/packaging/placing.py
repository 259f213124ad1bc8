"""Put files and directories in their places together: all of them, or none, and then everything is as it was."""

import contextlib
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from bca_deploy.errors import InputError


class Placing:
    """What is made beside its places, and not there yet."""

    def __init__(self) -> None:
        self._made: list[tuple[Path, Path]] = []
        self._parents: list[Path] = []
        self._undo: list[tuple[Path, Path]] = []
        self._old: list[Path] = []

    def staged(self, target: Path) -> Path:
        """Return a name beside ``target`` to write a file or a directory to.

        Raises:
            InputError: two things are to go to one place.
        """
        if target.absolute() in [other.absolute() for _, other in self._made]:
            raise InputError(f"{target} is given for two things; give each a place of its own")
        self._make_parents(target.parent)
        self._made.append((_beside(target), target))
        return self._made[-1][0]

    def _make_parents(self, directory: Path) -> None:
        missing = [parent for parent in (directory, *directory.parents) if not parent.exists()]
        directory.mkdir(parents=True, exist_ok=True)
        self._parents += missing

    def put(self) -> None:
        """Move everything to its place; what is there steps aside, to be removed or to come back."""
        for staged, target in self._made:
            if target.exists() or target.is_symlink():
                self._old.append(_beside(target))
                self._move(target, self._old[-1])
            self._move(staged, target)

    def _move(self, source: Path, target: Path) -> None:
        source.rename(target)
        self._undo.append((target, source))

    def give_up(self) -> None:
        """Move everything back, and remove what was made."""
        for target, source in reversed(self._undo):
            target.rename(source)
        self._old.clear()
        self.clean()
        for directory in self._parents:
            with contextlib.suppress(OSError):  # somebody else put something there meanwhile
                directory.rmdir()

    def clean(self) -> None:
        """Remove what is in no place."""
        for path in (*(staged for staged, _ in self._made), *self._old):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def _beside(target: Path) -> Path:
    return target.with_name(f".bca-{uuid.uuid4().hex}")


@contextlib.contextmanager
def together() -> Iterator[Placing]:
    """Give a place to make things; they go to their targets at the end, or nowhere if anything fails."""
    placing = Placing()
    try:
        yield placing
        placing.put()
    except BaseException:
        placing.give_up()
        raise
    placing.clean()
