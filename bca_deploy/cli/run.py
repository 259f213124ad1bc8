"""`bca run` and `bca bench`. Heavy imports wait until a command runs."""

from pathlib import Path
from typing import Annotated

import typer

from bca_deploy.cli.common import (
    BackendFlag,
    BundleArgument,
    JsonFlag,
    ModelFlag,
    PrecisionFlag,
    VerboseFlag,
    app,
    check_paths,
    guarded,
)
from bca_deploy.errors import InputError


@app.command("run")
def run_command(  # noqa: PLR0913  (one parameter per option)
    bundle: BundleArgument,
    inputs: Annotated[list[str] | None, typer.Option("--input", help="NAME=FILE.npy, or FILE.npz; again for more.")] = None,
    output: Annotated[Path, typer.Option(help="Where the outputs go, as one .npz.")] = Path("outputs.npz"),
    backend: BackendFlag = "auto",
    precision: PrecisionFlag = None,
    threads: Annotated[int | None, typer.Option(help="For onnxruntime on CPU. [default: every core]")] = None,
    selftest: Annotated[bool, typer.Option("--selftest", help="Run the bundle's own inputs and hold their bounds.")] = False,
    cast: Annotated[bool, typer.Option("--cast", help="Convert other dtypes to the model's.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the output file.")] = False,
    as_json: JsonFlag = False,
    verbose: VerboseFlag = False,
) -> None:
    """Run a bundle once, from files to a file. Needs neither torch nor onnx.

    Exit codes: 0 done, 1 self-test failed, 2 bad input.
    """
    with guarded(verbose):
        from bca_deploy.cli import console
        from bca_deploy.session.opening import open_session
        from bca_deploy.session.run_files import read_inputs, run

        if selftest == bool(inputs):
            raise InputError("give either --selftest, or --input for every input of the model")
        with open_session(bundle, backend, precision=precision, threads=threads) as session:
            if selftest:
                session.selftest()
                console.show_run(session, {}, None, as_json)
            else:
                outputs = run(session, read_inputs(inputs or []), output, cast, force)
                console.show_run(session, outputs, output, as_json)


@app.command("bench")
def bench_command(  # noqa: PLR0913  (one parameter per option)
    bundle: BundleArgument,
    shape: Annotated[
        list[str] | None,
        typer.Option(help="A size for each dimension, BATCHxX_LENxCONTEXT_LEN; again for more. [default: the grid below]"),
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Of the grid; again for more. [default: 1 and 8]")] = None,
    length: Annotated[
        list[int] | None, typer.Option(help="Of the grid, in every dimension but the batch. [default: 64 and 512]")
    ] = None,
    contender: Annotated[
        list[str] | None,
        typer.Option(
            help="eager, sdpa, compiled, plain (torch.onnx.export), literal, portable or openvino; again for more. "
            "[default: all that can run here]"
        ),
    ] = None,
    model: ModelFlag = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Weights to load into --model.")] = None,
    prefix: Annotated[str, typer.Option(help="Where the model is inside a bigger checkpoint.")] = "",
    backend: BackendFlag = "auto",
    precision: Annotated[list[str] | None, typer.Option(help="Again for more. [default: the session's]")] = None,
    threads: Annotated[
        list[int] | None, typer.Option(help="That each may use on the CPU; again for more. [default: every core]")
    ] = None,
    seconds: Annotated[float | None, typer.Option(help="For each contender in each cell. [default: 3]")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Four contenders at batch 1 and two lengths, a second each: under a minute.")
    ] = False,
    as_json: JsonFlag = False,
    verbose: VerboseFlag = False,
) -> None:
    """Time a bundle's session beside PyTorch and others, one process for each, in turn.

    Latency, throughput, peak memory, and how both grow; the session is always among them. Exit codes: 0 done, 2 bad input.
    """
    with guarded(verbose):
        from bca_deploy.benchmarking.grid import Asked, parse_shapes
        from bca_deploy.benchmarking.setting import Place
        from bca_deploy.benchmarking.suite import bench
        from bca_deploy.cli import console

        if model is None and (checkpoint is not None or prefix):
            raise InputError("--checkpoint and --prefix are about a whole model; give --model, too")
        check_paths(weights=checkpoint)
        asked = Asked(
            shapes=tuple(parse_shapes(shape or [])),
            batches=tuple(batch or ()),
            lengths=tuple(length or ()),
            precisions=tuple(precision or ()),
            threads=tuple(threads or ()),
            seconds=seconds,
            quick=quick,
        )
        place = Place(model, checkpoint, prefix) if model else None
        with console.progress() as progress:
            result = bench(bundle, asked, contender or (), backend=backend, place=place, progress=progress)
        console.show_bench(result, as_json)
