"""Optional libraries: imported here, or refused with the extra that brings them."""

import contextlib
import os
import sys
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from bca_deploy.errors import MissingDependencyError


def missing(package: str, extra: str) -> MissingDependencyError:
    """Return the error for an absent optional ``package`` that the given ``extra`` installs."""
    return MissingDependencyError(f"{package} is not installed; run: pip install 'bca-deploy[{extra}]'")


_TELEMETRY = "ORT_DISABLE_TELEMETRY"


def onnxruntime() -> Any:
    """Return the onnxruntime module.

    Raises:
        MissingDependencyError: it is not installed; the message holds the pip command.
    """
    try:
        with _unreported():
            return import_module("onnxruntime")
    except ImportError:
        raise missing("onnxruntime", "cpu") from None


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
