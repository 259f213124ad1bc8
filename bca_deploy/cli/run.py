"""`bca run` and `bca bench`. Heavy imports wait until a command runs."""

from pathlib import Path
from typing import Annotated

import typer

from bca_deploy.cli.common import BackendFlag, BundleArgument, JsonFlag, PrecisionFlag, VerboseFlag, app, guarded
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
def bench_command(
    bundle: BundleArgument,
    shape: Annotated[
        list[str] | None,
        typer.Option(help="BATCHxX_LENxCONTEXT_LEN; again for more. [default: 1x64x64, 1x512x512 and 8x512x512]"),
    ] = None,
    contender: Annotated[
        list[str] | None,
        typer.Option(
            help="eager, sdpa, compiled, literal, portable or openvino; again for more. [default: all that can run here]"
        ),
    ] = None,
    backend: BackendFlag = "auto",
    threads: Annotated[int | None, typer.Option(help="That each may use on the CPU. [default: every core]")] = None,
    seconds: Annotated[float, typer.Option(help="For each contender and shape.")] = 3.0,
    as_json: JsonFlag = False,
    verbose: VerboseFlag = False,
) -> None:
    """Time a bundle's session beside PyTorch and others, one process for each.

    Latency percentiles, throughput, and peak memory; the session is always among them. Exit codes: 0 done, 2 bad input.
    """
    with guarded(verbose):
        from bca_deploy.cli import console
        from bca_deploy.cli.bench import bench, parse_shapes

        shapes = parse_shapes(shape or ["1x64x64", "1x512x512", "8x512x512"])
        with console.progress() as progress:
            progress.stage("bench")
            report = bench(
                bundle, shapes, contender or (), backend=backend, threads=threads, seconds=seconds, progress=progress
            )
        console.show_bench(report, as_json)
