"""Optional libraries: imported here, or refused with the extra that brings them."""

import contextlib
import os
import sys
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from bca_deploy.errors import MissingDependencyError

_TELEMETRY = "ORT_DISABLE_TELEMETRY"


def missing(package: str, extra: str) -> MissingDependencyError:
    """Return the error for an absent optional ``package`` that the given ``extra`` installs."""
    return MissingDependencyError(f"{package} is not installed; run: {pip_command(extra)}")


def pip_command(extra: str) -> str:
    """Return the command that installs what an extra brings."""
    return f"pip install 'bca-deploy[{extra}]'"


def load(module: str, package: str, extra: str) -> Any:
    """Import a module of an optional package.

    Raises:
        MissingDependencyError: the package is not installed; the message holds the pip command.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise missing(package, extra) from error


def onnxruntime() -> Any:
    """Return the onnxruntime module.

    Raises:
        MissingDependencyError: it is not installed; the message holds the pip command.
    """
    with _unreported():
        return load("onnxruntime", "onnxruntime", "cpu")


@contextlib.contextmanager
def _unreported() -> Iterator[None]:
    """Have onnxruntime imported without telemetry, unless the variable is set: it reads it at that moment alone.

    Else it keeps an id of the machine in the home directory, warns where it cannot, as in a container, and reports home.
    The environment is the caller's: it is left as it was.
    """
    if "onnxruntime" in sys.modules or _TELEMETRY in os.environ:
        yield
        return
    os.environ[_TELEMETRY] = "1"
    try:
        yield
    finally:
        os.environ.pop(_TELEMETRY, None)


def providers() -> list[str]:
    """Return the execution providers of the installed onnxruntime."""
    found: list[str] = onnxruntime().get_available_providers()
    return found
