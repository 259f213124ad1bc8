"""What looks after a bundle: `bca build`, `refit`, `verify`, `inspect`, `doctor`. Heavy imports wait until a command runs."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from bca_deploy.cli.common import (
    BundleArgument,
    EngineFlag,
    JsonFlag,
    ModelFlag,
    ProfileFlag,
    TargetFlag,
    VerboseFlag,
    app,
    check_paths,
    guarded,
    need,
    read_profile,
    show_engines,
    with_settings,
)
from bca_deploy.errors import InputError


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
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="engine.KEY=VALUE", help="Any key of [engine], such as engine.tf32=true; again for more."
        ),
    ] = None,
    as_json: JsonFlag = False,
    verbose: VerboseFlag = False,
) -> None:
    """Compile a TensorRT engine into a bundle.

    Exit codes: 0 done, 1 parity failed, 2 bad input or no engine. On 1, 2 and 130 the bundle is as it was.
    """
    with guarded(verbose):
        from bca_deploy.cli import console
        from bca_deploy.exporter.recipe import read_recipe

        options = {"library": engine, "targets": tuple(target) if target else None, "precision": precision}
        options = with_settings(options, settings or [], "engine")
        asked = read_recipe(recipe, {"engine": options, "profile": tuple(map(read_profile, profile)) if profile else None})
        building = need("exporter.build")
        with console.progress() as progress:
            entry = building.build_recipe(bundle, asked, progress)
        _show_entry(entry, bundle, as_json)


def _show_entry(entry: Any, bundle: Path, as_json: bool) -> None:
    if as_json:
        typer.echo(entry.model_dump_json(indent=2))
    else:
        show_engines(bundle)


@app.command("refit")
def refit_command(
    bundle: BundleArgument,
    checkpoint: Annotated[Path, typer.Option(help="New weights of the same layer or model, a file or a directory.")],
    prefix: Annotated[str, typer.Option(help="Where the layer, or the model, is inside a bigger checkpoint.")] = "",
    model: ModelFlag = None,
    expect: Annotated[Path | None, typer.Option(help="Sample .npz of the new weights, in place of the bundle's.")] = None,
    drop_expect: Annotated[bool, typer.Option("--drop-expect", help="Go without the bundle's sample of the old.")] = False,
    as_json: JsonFlag = False,
    verbose: VerboseFlag = False,
) -> None:
    """Put new weights into a bundle: models, parity, self-test and engines together.

    Exit codes: 0 done, 1 parity failed, 2 bad input. On 1, 2 and 130 the bundle is as it was.
    """
    with guarded(verbose):
        check_paths(expect, weights=checkpoint)
        refitting = need("exporter.refit")
        from bca_deploy.cli import console

        with console.progress() as progress:
            made = need("whole.factory").make(model) if model else None
            options = {"prefix": prefix, "model": made, "sample": expect, "drop_sample": drop_expect}
            verdicts = refitting.refit(bundle, checkpoint, **options, progress=progress)
        _show_verdicts(verdicts, bundle, as_json)


def _made(model: str | None, checkpoint: Path | None) -> Any:
    """Return a whole model with its weights; None where there is none."""
    if model is None:
        if checkpoint is not None:
            raise InputError("--checkpoint is loaded into a whole model; give --model, too")
        return None
    return need("whole.factory").make(model, checkpoint)


def _show_verdicts(verdicts: Any, path: Path, as_json: bool) -> None:
    from bca_deploy.bundle.read import Bundle
    from bca_deploy.cli import console

    with Bundle.open(path, check="off") as bundle:
        trust = bundle.manifest.trust
    console.show_verdicts(verdicts, as_json, path, trust)
    if not as_json:
        console.show_trust(trust)


@app.command("verify")
def verify_command(
    bundle: BundleArgument,
    inputs: Annotated[list[Path] | None, typer.Option(help="Your own inputs, .npz; give it again for more.")] = None,
    model: ModelFlag = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Weights to load into --model.")] = None,
    parity: Annotated[Literal["quick", "full"], typer.Option(help="Which parity matrix.")] = "full",
    as_json: JsonFlag = False,
    verbose: VerboseFlag = False,
) -> None:
    """Hold a bundle against PyTorch again.

    Checks every hash, the self-test, the parity matrix, and your own inputs where given. Of a whole model the cases that the
    bundle keeps; with --model the matrix is drawn anew.

    Exit codes: 0 passed, 1 parity failed, 2 bad input or damaged bundle.
    """
    with guarded(verbose):
        verification = need("exporter.verify")
        from bca_deploy.cli import console

        with console.progress() as progress:
            made = _made(model, checkpoint)
            verdicts = verification.verify(bundle, inputs=inputs or (), model=made, scope=parity, progress=progress)
        _show_verdicts(verdicts, bundle, as_json)
        if not all(verdicts):
            raise typer.Exit(1)


@app.command("inspect")
def inspect_command(bundle: BundleArgument, as_json: JsonFlag = False, verbose: VerboseFlag = False) -> None:
    """Show what is in a bundle.

    Checks every hash first. Needs neither torch nor onnx.
    """
    with guarded(verbose):
        from bca_deploy.bundle.read import Bundle
        from bca_deploy.cli import console

        with Bundle.open(bundle) as opened:
            if as_json:
                typer.echo(opened.manifest.model_dump_json(indent=2))
            else:
                console.show_manifest(opened.manifest, bundle)


@app.command("doctor")
def doctor_command(as_json: JsonFlag = False, verbose: VerboseFlag = False) -> None:
    """Show what this machine can do, and the command that adds what is missing."""
    with guarded(verbose):
        from bca_deploy.cli import console, doctor

        console.show_findings(doctor.examine(), as_json)
