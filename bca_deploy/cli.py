"""The command line: `bca-export`, and `bca` with its commands. Heavy imports wait until a command runs."""

import atexit
import contextlib
import gc
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from bca_deploy.errors import BcaError, InputError, nearest

if TYPE_CHECKING:
    from bca_deploy.pipeline import Plan

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
BundleArgument = Annotated[Path, typer.Argument(help="A bundle's directory, or its .bca archive.")]


def main() -> None:
    """Run `bca`."""
    app()


def main_export() -> None:
    """Run `bca-export`."""
    export_app()


@contextlib.contextmanager
def _guarded(verbose: bool) -> Iterator[None]:
    """Turn errors into one readable message and the documented exit code."""
    # A short-lived process that makes millions of small objects and few cycles: collecting rarely saves a second of an export.
    gc.set_threshold(100_000, 20, 20)
    atexit.register(gc.freeze)
    logging.basicConfig(level=logging.DEBUG if verbose else logging.ERROR, stream=sys.stderr)
    logging.getLogger("bca_deploy").setLevel(logging.DEBUG if verbose else logging.WARNING)
    if not verbose:
        warnings.simplefilter("ignore")
    try:
        yield
    except BcaError as error:
        _fail(str(error), error.exit_code)
    except OSError as error:
        _fail(f"{error.strerror or error}: {error.filename or ''}".rstrip(": "), 2)
    except KeyboardInterrupt:
        _fail("interrupted; nothing was left behind", 130)


def _fail(message: str, code: int) -> None:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(code)


@export_app.command()
@app.command("export")
def export_command(  # noqa: PLR0913  (one parameter per option)
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Trained weights: .pt, .pth or .safetensors. Seeded weights where absent."),
    ] = None,
    heads: Annotated[
        int | None,
        typer.Option(help="Attention heads; required with a checkpoint without talking heads."),
    ] = None,
    prefix: Annotated[str, typer.Option(help="Where the layer is inside a bigger checkpoint, such as encoder.fusion.")] = "",
    expect: Annotated[
        Path | None,
        typer.Option(help="Sample .npz of inputs and outputs from your own code; proves it is the same function."),
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="A recipe, such as export/recipes/masked.toml.")] = None,
    opset: Annotated[int | None, typer.Option(help="ai.onnx opset of the file, 17 to 27. [default: 17]")] = None,
    lowering: Annotated[
        Literal["auto", "reference", "fused"] | None,
        typer.Option(help="Form of the attention; auto takes fused where it is possible."),
    ] = None,
    precision: Annotated[
        list[str] | None,
        typer.Option(help="fp32, fp16 or bf16; give it again for more. [default: fp32]"),
    ] = None,
    parity: Annotated[
        Literal["quick", "full"] | None,
        typer.Option(help="Which parity matrix must pass. [default: quick]"),
    ] = None,
    mask: Annotated[bool | None, typer.Option("--mask/--no-mask", help="Input mask.")] = None,
    context_mask: Annotated[bool | None, typer.Option("--context-mask/--no-context-mask", help="Input context_mask.")] = None,
    rel_pos_bias: Annotated[
        Literal["none", "plane", "shared", "batch"] | None,
        typer.Option(help="Input rel_pos_bias: [i,j], [heads,i,j] or [batch,heads,i,j]."),
    ] = None,
    attention_maps: Annotated[
        bool | None,
        typer.Option("--attention-maps/--no-attention-maps", help="Outputs attn, context_attn."),
    ] = None,
    keep_io_types: Annotated[
        bool | None,
        typer.Option("--keep-io-types/--half-io", help="fp32 at the edges whatever the precision."),
    ] = None,
    batch: Annotated[str | None, typer.Option(help="Batch size as MIN:OPT:MAX. [default: 1:4:8]")] = None,
    x_len: Annotated[str | None, typer.Option(help="Length of x as MIN:OPT:MAX. [default: 1:512:2048]")] = None,
    context_len: Annotated[str | None, typer.Option(help="Length of context as MIN:OPT:MAX. [default: 1:512:2048]")] = None,
    engine: EngineFlag = None,
    target: TargetFlag = None,
    profile: ProfileFlag = None,
    out: Annotated[Path | None, typer.Option(help="The bundle's directory. [default: build/model]")] = None,
    archive: Annotated[Path | None, typer.Option(help="Write one .bca file instead of a directory.")] = None,
    external_data_bytes: Annotated[
        int | None,
        typer.Option(help="Weights above this total leave the .onnx file. [default: 2000000000]"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing bundle.")] = False,
    keep_failed: Annotated[bool, typer.Option("--keep-failed", help="Leave what failed parity as <out>.failed.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and stop.")] = False,
    as_json: JsonFlag = False,
    verbose: VerboseFlag = False,
) -> None:
    """Export a layer to an ONNX bundle, proven equal to PyTorch.

    Exit codes: 0 done, 1 parity failed, 2 bad input, 130 interrupted. On 1, 2 and 130 no bundle is left.
    """
    with _guarded(verbose):
        options = {
            "opset": opset,
            "lowering": lowering,
            "precision": tuple(precision) if precision else None,
            "parity": parity,
            "keep_io_types": keep_io_types,
            "external_data_bytes": external_data_bytes,
            "inputs": {"mask": mask, "context_mask": context_mask, "rel_pos_bias": rel_pos_bias},
            "outputs": {"attention_maps": attention_maps},
            "dims": {"batch": _range(batch), "x_len": _range(x_len), "context_len": _range(context_len)},
            "engine": {"library": engine, "targets": tuple(target) if target else None},
            "profile": tuple(map(_profile, profile)) if profile else None,
        }
        _check_paths(checkpoint, expect)
        plan = _plan(recipe, options, checkpoint, heads, prefix, expect, _target(out, archive), force)
        from bca_deploy import console, pipeline

        if dry_run:
            console.show_plan(plan, checkpoint, as_json)
            return
        with console.progress() as progress:
            verdicts = pipeline.run(plan, progress, keep_failed)
        console.show_verdicts(verdicts, as_json, plan.out)
        if plan.engine is not None and not as_json:
            _show_engines(plan.out)


def _show_engines(path: Path) -> None:
    from bca_deploy import console
    from bca_deploy.bundle import Bundle

    with Bundle.open(path, check="off") as bundle:
        console.show_engines(bundle.manifest.engines, bundle.manifest, path)


def _plan(
    recipe: Path | None,
    options: dict[str, Any],
    checkpoint: Path | None,
    heads: int | None,
    prefix: str,
    expect: Path | None,
    out: Path,
    force: bool,
) -> "Plan":
    from bca_deploy.recipe import read_recipe

    read = read_recipe(recipe, options)
    pipeline, samples = _need("pipeline"), _need("expect")
    loaded = pipeline.load_checkpoint(read, checkpoint, heads, prefix)
    plan: Plan = pipeline.make_plan(read, loaded, out, force, samples.read(expect) if expect else {})
    return plan


@app.command("build")
def build_command(  # noqa: PLR0913  (one parameter per option)
    bundle: BundleArgument,
    engine: EngineFlag = None,
    target: TargetFlag = None,
    precision: Annotated[
        Literal["fp32", "fp16", "bf16"] | None,
        typer.Option(help="Of the model to compile; made from the bundle's weights where absent. [default: fp16]"),
    ] = None,
    profile: ProfileFlag = None,
    recipe: Annotated[Path | None, typer.Option(help="A recipe with [engine] and [[profile]].")] = None,
    workspace_mib: Annotated[int | None, typer.Option(help="Most scratch memory the engine may need, in MiB.")] = None,
    optimization_level: Annotated[int | None, typer.Option(help="How hard the builder tries, 0 to 5.")] = None,
    aux_streams: Annotated[
        int | None,
        typer.Option(help="Streams besides the main one: more overlap for more memory. [default: 0]"),
    ] = None,
    layer_names: Annotated[
        Literal["detailed", "names", "none"] | None,
        typer.Option(help="What the engine tells about its layers. [default: detailed]"),
    ] = None,
    timing_cache: Annotated[Path | None, typer.Option(help="tensorrt: file of measured timings, made if absent.")] = None,
    version_compatible: Annotated[
        bool | None,
        typer.Option("--version-compatible/--same-version", help="tensorrt: also loads in later versions."),
    ] = None,
    hardware_compatibility: Annotated[
        Literal["none", "ampere_plus", "same_compute_capability"] | None,
        typer.Option(help="tensorrt: which other GPUs may run it. [default: none]"),
    ] = None,
    strip_weights: Annotated[
        bool | None,
        typer.Option("--strip-weights/--keep-weights", help="tensorrt: leave the weights out."),
    ] = None,
    refittable: Annotated[bool | None, typer.Option("--refittable/--fixed", help="tensorrt: takes new weights.")] = None,
    tf32: Annotated[bool | None, typer.Option("--tf32/--no-tf32", help="Let fp32 products round to TF32.")] = None,
    time_limit_s: Annotated[float | None, typer.Option(help="Stop the builder after this many seconds.")] = None,
    as_json: JsonFlag = False,
    verbose: VerboseFlag = False,
) -> None:
    """Compile a TensorRT engine into a bundle.

    Exit codes: 0 done, 1 parity failed, 2 bad input or no engine. On 1, 2 and 130 the bundle is as it was.
    """
    with _guarded(verbose):
        from bca_deploy import console
        from bca_deploy.recipe import read_recipe

        options = {
            "library": engine,
            "targets": tuple(target) if target else None,
            "precision": precision,
            "workspace_mib": workspace_mib,
            "optimization_level": optimization_level,
            "aux_streams": aux_streams,
            "layer_names": layer_names,
            "timing_cache": timing_cache,
            "version_compatible": version_compatible,
            "hardware_compatibility": hardware_compatibility,
            "strip_weights": strip_weights,
            "refittable": refittable,
            "tf32": tf32,
            "time_limit_s": time_limit_s,
        }
        asked = read_recipe(recipe, {"engine": options, "profile": tuple(map(_profile, profile)) if profile else None})
        building = _need("building")
        with console.progress() as progress:
            entry = building.build_recipe(bundle, asked, progress)
        _show_entry(entry, bundle, as_json)


def _show_entry(entry: Any, bundle: Path, as_json: bool) -> None:
    if as_json:
        typer.echo(entry.model_dump_json(indent=2))
    else:
        _show_engines(bundle)


@app.command("refit")
def refit_command(
    bundle: BundleArgument,
    checkpoint: Annotated[Path, typer.Option(help="New weights of the same layer: .pt, .pth or .safetensors.")],
    prefix: Annotated[str, typer.Option(help="Where the layer is inside a bigger checkpoint.")] = "",
    expect: Annotated[Path | None, typer.Option(help="Sample .npz of the new weights, in place of the bundle's.")] = None,
    drop_expect: Annotated[bool, typer.Option("--drop-expect", help="Go without the bundle's sample of the old.")] = False,
    as_json: JsonFlag = False,
    verbose: VerboseFlag = False,
) -> None:
    """Put new weights into a bundle: models, parity, self-test and engines together.

    Exit codes: 0 done, 1 parity failed, 2 bad input. On 1, 2 and 130 the bundle is as it was.
    """
    with _guarded(verbose):
        _check_paths(checkpoint, expect)
        refitting = _need("refitting")
        from bca_deploy import console

        with console.progress() as progress:
            verdicts = refitting.refit(
                bundle, checkpoint, prefix=prefix, sample=expect, drop_sample=drop_expect, progress=progress
            )
        console.show_verdicts(verdicts, as_json, bundle)


BackendFlag = Annotated[
    str,
    typer.Option(
        help="auto, tensorrt, rtx, onnxruntime-cuda, onnxruntime-tensorrt or onnxruntime-cpu; all but auto never fall back."
    ),
]


@app.command("run")
def run_command(  # noqa: PLR0913  (one parameter per option)
    bundle: BundleArgument,
    inputs: Annotated[list[str] | None, typer.Option("--input", help="NAME=FILE.npy, or FILE.npz; again for more.")] = None,
    output: Annotated[Path, typer.Option(help="Where the outputs go, as one .npz.")] = Path("outputs.npz"),
    backend: BackendFlag = "auto",
    precision: Annotated[Literal["fp32", "fp16", "bf16"] | None, typer.Option(help="Of the model. [default: best]")] = None,
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
    with _guarded(verbose):
        from bca_deploy import console
        from bca_deploy.running import read_inputs, run
        from bca_deploy.session import open_session

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
    with _guarded(verbose):
        from bca_deploy import console
        from bca_deploy.bench import bench, parse_shapes

        shapes = parse_shapes(shape or ["1x64x64", "1x512x512", "8x512x512"])
        with console.progress() as progress:
            progress.stage("bench")
            report = bench(
                bundle, shapes, contender or (), backend=backend, threads=threads, seconds=seconds, progress=progress
            )
        console.show_bench(report, as_json)


@app.command("doctor")
def doctor_command(as_json: JsonFlag = False, verbose: VerboseFlag = False) -> None:
    """Show what this machine can do, and the command that adds what is missing."""
    with _guarded(verbose):
        from bca_deploy import console, doctor

        console.show_findings(doctor.examine(), as_json)


@app.command("verify")
def verify_command(
    bundle: BundleArgument,
    inputs: Annotated[list[Path] | None, typer.Option(help="Your own inputs, .npz; give it again for more.")] = None,
    parity: Annotated[Literal["quick", "full"], typer.Option(help="Which parity matrix.")] = "full",
    as_json: JsonFlag = False,
    verbose: VerboseFlag = False,
) -> None:
    """Hold a bundle against PyTorch again.

    Checks every hash, the self-test, the parity matrix, and your own inputs where given.

    Exit codes: 0 passed, 1 parity failed, 2 bad input or damaged bundle.
    """
    with _guarded(verbose):
        verification = _need("verification")
        from bca_deploy import console

        with console.progress() as progress:
            verdicts = verification.verify(bundle, inputs=inputs or (), scope=parity, progress=progress)
        console.show_verdicts(verdicts, as_json, bundle)
        if not all(verdicts):
            raise typer.Exit(1)


@app.command("inspect")
def inspect_command(bundle: BundleArgument, as_json: JsonFlag = False, verbose: VerboseFlag = False) -> None:
    """Show what is in a bundle.

    Checks every hash first. Needs neither torch nor onnx.
    """
    with _guarded(verbose):
        from bca_deploy import console
        from bca_deploy.bundle import Bundle

        with Bundle.open(bundle) as opened:
            if as_json:
                typer.echo(opened.manifest.model_dump_json(indent=2))
            else:
                console.show_manifest(opened.manifest, bundle)


def _need(module: str) -> Any:
    """Import a module of the export stages, whose packages are in an extra."""
    from importlib import import_module

    from bca_deploy.errors import missing

    try:
        return import_module(f"bca_deploy.{module}")
    except ModuleNotFoundError as error:
        raise missing(error.name or "a package", "export") from error


def _range(text: str | None) -> dict[str, int] | None:
    if text is None:
        return None
    parts = text.split(":")
    if len(parts) not in (1, 3) or not all(part.strip().isdecimal() for part in parts):
        raise InputError(f"dimension range {text!r}: give MIN:OPT:MAX such as 1:512:2048, or one number for a fixed size")
    low, opt, high = (int(part) for part in (parts * 3 if len(parts) == 1 else parts))
    return {"min": low, "opt": opt, "max": high}


def _profile(text: str) -> dict[str, dict[str, int] | None]:
    names = ("batch", "x_len", "context_len")
    parts = [part.partition("=") for part in text.split(",")]
    for name, _, _ in parts:
        if name.strip() not in names:
            raise InputError(
                f"profile {text!r}: {name!r} is no dimension{nearest(name, names)}; give batch=1:1:4,x_len=1:128:512"
            )
    return {name.strip(): _range(sizes) for name, _, sizes in parts}


def _target(out: Path | None, archive: Path | None) -> Path:
    if archive is None:
        return out or Path("build/model")
    if out is not None:
        raise InputError("--out and --archive are two places for one bundle; give one of them")
    if archive.suffix != ".bca":
        raise InputError(f"--archive {archive}: the name must end in .bca")
    return archive


def _check_paths(*paths: Path | None) -> None:
    """Refuse a missing file before the slow imports."""
    for path in paths:
        if path is not None and not path.is_file():
            raise InputError(f"{path} does not exist or is not a file; check the path")
