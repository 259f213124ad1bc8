"""What the commands share: the two applications, their flags, how errors end, what is read from flags."""

import atexit
import contextlib
import gc
import json
import logging
import re
import sys
import tomllib
import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from bca_deploy import __version__, ending
from bca_deploy.errors import BcaError, InputError
from bca_deploy.optional import missing

app = typer.Typer(
    name="bca",
    help="Export bidirectional cross-attention to a validated ONNX bundle, and look after the bundle.",
    no_args_is_help=True,
    rich_markup_mode=None,  # importing rich for a help page would double its time
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
export_app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _say_version(asked: bool) -> None:
    if asked:
        typer.echo(f"bca-deploy {__version__}")
        raise typer.Exit


VersionFlag = Annotated[
    bool, typer.Option("--version", help="Show the version and stop.", callback=_say_version, is_eager=True)
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
VerboseFlag = Annotated[bool, typer.Option("--verbose", "-v", help="Show what the libraries underneath log.")]
EngineFlag = Annotated[
    Literal["rtx", "tensorrt"] | None,
    typer.Option(help="Compile an engine: rtx ahead of time, tensorrt for the GPU at hand."),
]
TargetFlag = Annotated[
    list[str] | None,
    typer.Option(help="GPU generation for rtx, such as sm89; give it again for more. [default: all]"),
]
ProfileFlag = Annotated[
    list[str] | None,
    typer.Option(help="Optimization profile as batch=1:1:4,x_len=1:128:512; give it again for more. [default: the dims]"),
]
ModelFlag = Annotated[
    str | None,
    typer.Option(
        help="A whole model: pkg.module:factory or file.py:factory, which runs that code of yours; or a file.pt2 of "
        "torch.export.save, which runs none (torch reads it by pickle: only files that you trust)."
    ),
]
BundleArgument = Annotated[Path, typer.Argument(help="A bundle's directory, or its .bca archive.")]
PrecisionFlag = Annotated[Literal["fp32", "fp16", "bf16"] | None, typer.Option(help="Of the model. [default: best]")]
BackendFlag = Annotated[
    str,
    typer.Option(
        help="auto, tensorrt, rtx, onnxruntime-cuda, onnxruntime-tensorrt or onnxruntime-cpu; all but auto never fall back."
    ),
]


@app.callback()
def _options(version: VersionFlag = False) -> None:
    """Take what stands before the command."""


@contextlib.contextmanager
def guarded(verbose: bool, lasting: bool = False) -> Iterator[None]:
    """Turn errors into one readable message and the documented exit code.

    Args:
        verbose: show what the libraries log.
        lasting: the process stays, and must give back what it no longer needs.
    """
    # A short-lived process that makes millions of small objects and few cycles: collecting rarely saves a second of an export.
    if not lasting:
        gc.set_threshold(100_000, 20, 20)
    atexit.register(gc.freeze)
    logging.basicConfig(level=logging.DEBUG if verbose else logging.ERROR, stream=sys.stderr)
    logging.getLogger("bca_deploy").setLevel(logging.DEBUG if verbose else logging.WARNING)
    if not verbose:
        warnings.simplefilter("ignore")
    try:
        with ending.cleanly():
            yield
    except BcaError as error:
        _fail(str(error), error.exit_code)
    except BrokenPipeError:  # nobody reads what is printed: see ending.py
        raise
    except OSError as error:
        _fail(f"{error.strerror or error}: {error.filename or ''}".rstrip(": "), 2)
    except KeyboardInterrupt as error:
        ended = error if isinstance(error, ending.Ended) else ending.Ended()
        _fail(str(ended), ended.exit_code)


def _fail(message: str, code: int) -> None:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(code)


def need(module: str) -> Any:
    """Import a module of the export stages, whose packages are in an extra."""
    try:
        with ending.at_once():
            return import_module(f"bca_deploy.{module}")
    except ModuleNotFoundError as error:
        raise missing(error.name or "a package", "export") from error


def with_settings(given: dict[str, Any], texts: list[str], table: str) -> dict[str, Any]:
    """Return a table's keys with those of ``TABLE.KEY=VALUE``, the value as in a recipe, where a word needs no quotes.

    Raises:
        InputError: it is written otherwise, or the key was given twice, by a flag of its own or by another ``--set``.
    """
    found = {key: value for key, value in given.items() if value is not None}
    for text in texts:
        name, equals, value = text.partition("=")
        where, _, key = name.rpartition(".")
        if not (equals and key) or where != table:
            raise InputError(f"--set {text!r}: give {table}.KEY=VALUE, such as {table}.tf32=true")
        if key in found:
            raise InputError(f"--set {text!r}: {table}.{key} is {found[key]!r} by a flag or another --set; give it once")
        try:
            found[key] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            found[key] = value
    return found


def read_range(text: str | None) -> dict[str, int] | None:
    """Read ``MIN:OPT:MAX``, or one number for a fixed size; errors as for every flag."""
    if text is None:
        return None
    parts = text.split(":")
    if len(parts) not in (1, 3) or not all(part.strip().isdecimal() for part in parts):
        raise InputError(f"dimension range {text!r}: give MIN:OPT:MAX such as 1:512:2048, or one number for a fixed size")
    low, opt, high = (int(part) for part in (parts * 3 if len(parts) == 1 else parts))
    return {"min": low, "opt": opt, "max": high}


def read_profile(text: str) -> dict[str, dict[str, int] | None]:
    """Read ``batch=1:1:4,x_len=1:128:512``."""
    parts = [part.partition("=") for part in text.split(",")]
    if not all(name.strip() and equals for name, equals, _ in parts):
        raise InputError(f"profile {text!r}: give DIMENSION=MIN:OPT:MAX for some, such as batch=1:1:4,x_len=1:128:512")
    return {name.strip(): read_range(sizes) for name, _, sizes in parts}


def check_name(name: str) -> None:
    """Refuse what cannot be part of URLs and of paths."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise InputError(f"--name {name!r}: give letters, digits, '_', '.' and '-', beginning with a letter or digit")


def check_paths(*paths: Path | None, weights: Path | None = None) -> None:
    """Refuse a missing file before the slow imports; weights may be a directory of them."""
    for path in paths:
        if path is not None and not path.is_file():
            raise InputError(f"{path} does not exist or is not a file; check the path")
    if weights is not None and not weights.exists():
        raise InputError(f"{weights} does not exist or is not a file; check the path")


def show_tuned(path: Path) -> None:
    """Print what a bundle's export measured to choose the form of its graph for the CPU."""
    from bca_deploy.bundle.manifest import BUILD_FILE
    from bca_deploy.bundle.read import Bundle
    from bca_deploy.cli import console

    with Bundle.open(path, check="off") as bundle:
        console.show_tuned(json.loads((bundle.directory / BUILD_FILE).read_text(encoding="utf-8")).get("tuned"))


def show_engines(path: Path) -> None:
    """Print the engines of a bundle."""
    from bca_deploy.bundle.read import Bundle
    from bca_deploy.cli import console

    with Bundle.open(path, check="off") as bundle:
        console.show_engines(bundle.manifest.engines, bundle.manifest, path)
