"""`bca-export`, which is `bca export`. Heavy imports wait until a command runs."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer

from bca_deploy.cli.common import (
    EngineFlag,
    JsonFlag,
    ModelFlag,
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
    show_tuned,
)
from bca_deploy.errors import InputError

if TYPE_CHECKING:
    from bca_deploy.exporter.plan import Plan
    from bca_deploy.exporter.recipe import Recipe
    from bca_deploy.exporter.source import Source
    from bca_deploy.progress import Progress


@export_app.command()
@app.command("export")
def export_command(  # noqa: PLR0913  (one parameter per option)
    model: ModelFlag = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Trained weights, a file or a directory. Seeded weights, or the factory's, where absent."),
    ] = None,
    samples: Annotated[
        list[Path] | None,
        typer.Option("--inputs", help="Sample .npz of a model's inputs by forward's names; two of different sizes."),
    ] = None,
    dim: Annotated[
        list[str] | None,
        typer.Option(help="Range of a model's dimension, NAME=MIN:OPT:MAX. [default: 1, the sample's size, four times that]"),
    ] = None,
    axes: Annotated[
        list[str] | None,
        typer.Option(help="Names of an input's axes, such as video=batch,video_len,0 where 0 keeps the sample's size."),
    ] = None,
    int_mask: Annotated[
        list[str] | None,
        typer.Option("--mask", metavar="NAME:DIM", help="An integer input of a model that masks a dimension."),
    ] = None,
    value_range: Annotated[
        list[str] | None,
        typer.Option("--range", metavar="NAME=LOW:HIGH", help="Values of an integer input. [default: the samples']"),
    ] = None,
    keep_literal: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH", help="Leave this layer of a model as it is."),
    ] = None,
    allow_none: Annotated[bool, typer.Option("--allow-none", help="Export a model without the layer, too.")] = False,
    heads: Annotated[
        int | None,
        typer.Option(help="Attention heads; required with a checkpoint without talking heads."),
    ] = None,
    prefix: Annotated[
        str, typer.Option(help="Where the layer, or the model, is inside a bigger checkpoint, such as encoder.fusion.")
    ] = "",
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
    no_mask: Annotated[bool, typer.Option("--no-mask", help="The layer without input mask.")] = False,
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
    tune: Annotated[bool, typer.Option("--tune", help="Measure here which form the graph for the CPU takes.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and stop.")] = False,
    as_json: JsonFlag = False,
    verbose: VerboseFlag = False,
    version: VersionFlag = False,
) -> None:
    """Export a layer, or a whole model with layers in it, to an ONNX bundle, proven equal to PyTorch.

    Exit codes: 0 done, 1 parity failed, 2 bad input, 130 interrupted, 143 terminated. On all but 0 no bundle is left.
    """
    with guarded(verbose):
        from bca_deploy.cli import console

        options = {
            "opset": opset,
            "lowering": lowering,
            "precision": tuple(precision) if precision else None,
            "parity": parity,
            "tune": tune or None,
            "keep_io_types": keep_io_types,
            "external_data_bytes": external_data_bytes,
            "inputs": {"mask": False if no_mask else None, "context_mask": context_mask, "rel_pos_bias": rel_pos_bias},
            "outputs": {"attention_maps": attention_maps},
            "dims": {
                **{"batch": read_range(batch), "x_len": read_range(x_len), "context_len": read_range(context_len)},
                **_pairs("--dim", dim, "=", read_range),
            },
            "model": {
                "factory": model,
                "samples": tuple(samples) if samples else None,
                "axes": _pairs("--axes", axes, "=", _read_axes),
                "masks": _pairs("--mask", int_mask, ":", str),
                "ranges": _pairs("--range", value_range, "=", _read_values),
                "keep_literal": tuple(keep_literal) if keep_literal else None,
                "allow_none": allow_none or None,
            },
            "engine": {"library": engine, "targets": tuple(target) if target else None},
            "profile": tuple(map(read_profile, profile)) if profile else None,
        }
        check_paths(expect, *(samples or ()), weights=checkpoint)
        with console.progress() as progress:
            plan = _plan(recipe, options, _Given(checkpoint, heads, prefix, expect), _target(out, archive), force, progress)
        from bca_deploy.exporter import pipeline

        if dry_run:
            table = plan.recipe.model
            console.show_plan(plan, checkpoint or (table.checkpoint if table else None), as_json)
            return
        with console.progress() as progress:
            verdicts = pipeline.run(plan, progress, keep_failed)
        console.show_verdicts(verdicts, as_json, plan.out, plan.source.trust)
        console.show_guesses(plan)
        if plan.recipe.tune and not as_json:
            show_tuned(plan.out)
        if plan.engine is not None and not as_json:
            show_engines(plan.out)
        if not as_json:
            console.show_trust(plan.source.trust)


class _Given(NamedTuple):
    """What says which weights, and that they are right."""

    checkpoint: Path | None
    heads: int | None
    prefix: str
    expect: Path | None


def _plan(recipe: Path | None, options: dict[str, Any], given: _Given, out: Path, force: bool, progress: "Progress") -> "Plan":
    from bca_deploy.exporter.recipe import read_recipe

    read = read_recipe(recipe, options)
    plans = need("exporter.plan")
    source = partial(_layer, read, given) if read.model is None else partial(_model, read, given, progress)
    plan: Plan = plans.make_plan(read, source, out, force)
    return plan


def _layer(recipe: "Recipe", given: _Given) -> "Source":
    plans, samples = need("exporter.plan"), need("parity.user_sample")
    loaded = plans.load_checkpoint(recipe, given.checkpoint, given.heads, given.prefix)
    source: Source = plans.layer_source(recipe, loaded, samples.read(given.expect) if given.expect else {})
    return source


def _model(recipe: "Recipe", given: _Given, progress: "Progress") -> "Source":
    table = recipe.model
    if table is None or table.factory is None:
        raise InputError("what was given is about a whole model; give the model, too: --model pkg.module:factory")
    for flag, value in (("--heads", given.heads), ("--expect", given.expect)):
        if value is not None:
            raise InputError(f"{flag} is about the bare layer; a whole model's own outputs on its --inputs are its truth")
    factory, source = need("whole.factory"), need("exporter.model_source")
    made = factory.make(table.factory, given.checkpoint or table.checkpoint, given.prefix or table.prefix)
    from bca_deploy.files import read_arrays

    found: Source = source.read_model(made, [read_arrays(path) for path in table.samples], recipe, progress)
    return found


def _pairs(flag: str, texts: list[str] | None, separator: str, read: Callable[[str], Any]) -> dict[str, Any]:
    """Read ``NAME=VALUE`` of a flag that may come again."""
    found: dict[str, Any] = {}
    for text in texts or []:
        name, there, value = text.partition(separator)
        if not (name and there and value) or name in found:
            raise InputError(f"{flag} {text!r}: give NAME{separator}VALUE, each name once")
        found[name] = read(value)
    return found


def _read_axes(text: str) -> tuple[str | int, ...]:
    return tuple(int(part) if part.strip().isdecimal() else part.strip() for part in text.split(","))


def _read_values(text: str) -> tuple[int, int]:
    low, there, high = text.partition(":")
    try:
        return int(low), int(high if there else low)
    except ValueError:
        raise InputError(f"--range {text!r}: give LOW:HIGH, whole numbers such as 0:30521") from None


def _target(out: Path | None, archive: Path | None) -> Path:
    if archive is None:
        return out or Path("build/model")
    if out is not None:
        raise InputError("--out and --archive are two places for one bundle; give one of them")
    if archive.suffix != ".bca":
        raise InputError(f"--archive {archive}: the name must end in .bca")
    return archive
