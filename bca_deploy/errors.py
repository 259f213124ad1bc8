"""The errors a caller may meet. A message says what, what it got, what is allowed and what to do."""

import difflib
from collections.abc import Iterable


class BcaError(Exception):
    """Root of every error that bca-deploy raises on purpose.

    Attributes:
        exit_code: what the command line exits with: 1 parity failed, 2 bad input.
    """

    exit_code = 2


class InputError(BcaError, ValueError):
    """An argument, option or recipe value that cannot be used."""


class CheckpointError(BcaError):
    """A checkpoint that cannot be read, or that is not this layer."""


class LoweringError(BcaError):
    """A lowering that cannot express what was asked for."""


class ExportError(BcaError):
    """The ONNX file could not be made as asked."""


class EngineError(BcaError):
    """An engine could not be built, or does not belong to this bundle, library or GPU."""


class BundleError(BcaError):
    """A bundle that is missing, damaged, locked, unsafe or of a newer format."""


class ServerError(BcaError):
    """A server that cannot be reached, is busy, or failed; the message says which."""


class MissingDependencyError(BcaError, ImportError):
    """An optional package is needed and absent; the message holds the pip command."""


class ParityError(BcaError):
    """The exported model is not the same function as the PyTorch layer."""

    exit_code = 1


def first_line(error: Exception) -> str:
    """Return the first line with text of what a library raised; its class and arguments where it says nothing."""
    return first_said([str(error)], repr(error))


def check_one_of(what: str, value: object, allowed: Iterable[str]) -> None:
    """Refuse a value that is none of the names on offer.

    Raises:
        InputError: naming the closest and all that are allowed.
    """
    names = list(allowed)
    if not isinstance(value, str) or value not in names:
        raise InputError(f"{what} {value!r} is not known{nearest(str(value), names)}; allowed: {', '.join(names)}")


def first_said(texts: Iterable[str], otherwise: str) -> str:
    """Return the first line of them that is not blank."""
    return next((line.strip() for text in texts for line in text.splitlines() if line.strip()), otherwise)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the known name closest to ``name``, or an empty string."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {match[0]!r}?)" if match else ""
