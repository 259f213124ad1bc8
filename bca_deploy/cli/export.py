"""`bca-export`, which is `bca export`. Heavy imports wait until a command runs."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from bca_deploy.cli.common import (
    EngineFlag,
    JsonFlag,
    ProfileFlag,
    TargetFlag,
    VerboseFlag,
    VersionFlag,
    app,
    check_paths,
    export_app,
    guarded,
    need,
    read_profile,
    read_range,
    show_engines,
)
from bca_deploy.errors import InputError

if TYPE_CHECKING:
    from bca_deploy.exporter.plan import Plan


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
    version: VersionFlag = False,
) -> None:
    """Export a layer to an ONNX bundle, proven equal to PyTorch.

    Exit codes: 0 done, 1 parity failed, 2 bad input, 130 interrupted, 143 terminated. On all but 0 no bundle is left.
    """
    with guarded(verbose):
        options = {
            "opset": opset,
            "lowering": lowering,
            "precision": tuple(precision) if precision else None,
            "parity": parity,
            "keep_io_types": keep_io_types,
            "external_data_bytes": external_data_bytes,
            "inputs": {"mask": mask, "context_mask": context_mask, "rel_pos_bias": rel_pos_bias},
            "outputs": {"attention_maps": attention_maps},
            "dims": {"batch": read_range(batch), "x_len": read_range(x_len), "context_len": read_range(context_len)},
            "engine": {"library": engine, "targets": tuple(target) if target else None},
            "profile": tuple(map(read_profile, profile)) if profile else None,
        }
        check_paths(checkpoint, expect)
        plan = _plan(recipe, options, checkpoint, heads, prefix, expect, _target(out, archive), force)
        from bca_deploy.cli import console
        from bca_deploy.exporter import pipeline

        if dry_run:
            console.show_plan(plan, checkpoint, as_json)
            return
        with console.progress() as progress:
            verdicts = pipeline.run(plan, progress, keep_failed)
        console.show_verdicts(verdicts, as_json, plan.out)
        if plan.engine is not None and not as_json:
            show_engines(plan.out)


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
    from bca_deploy.exporter.recipe import read_recipe

    read = read_recipe(recipe, options)
    plans, samples = need("exporter.plan"), need("parity.user_sample")
    loaded = plans.load_checkpoint(read, checkpoint, heads, prefix)
    plan: Plan = plans.make_plan(read, loaded, out, force, samples.read(expect) if expect else {})
    return plan


def _target(out: Path | None, archive: Path | None) -> Path:
    if archive is None:
        return out or Path("build/model")
    if out is not None:
        raise InputError("--out and --archive are two places for one bundle; give one of them")
    if archive.suffix != ".bca":
        raise InputError(f"--archive {archive}: the name must end in .bca")
    return archive
