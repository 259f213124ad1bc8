"""`bca build`: add an engine to a finished bundle, with the model of its precision where that is not there yet."""

from pathlib import Path
from typing import Any

from bca_deploy.bundle.manifest import EngineEntry, precisions
from bca_deploy.bundle.write import revised, write_build
from bca_deploy.engines import build as engines
from bca_deploy.errors import InputError
from bca_deploy.exporter.recipe import Recipe, read_recipe
from bca_deploy.progress import Clock, Progress, Silent


def build(
    bundle: str | Path,
    library: str | None = None,
    *,
    progress: Progress | None = None,
    recipe: str | Path | None = None,
    **options: Any,
) -> EngineEntry:
    """Compile a TensorRT engine into a bundle.

    Args:
        bundle: its directory or archive; it is replaced whole, or not at all.
        library: ``rtx`` builds ahead of time on any machine, ``tensorrt`` for the GPU at hand; None takes the recipe's, or
            ``rtx`` where there is no recipe.
        progress: told about stages.
        recipe: a recipe file with ``[engine]`` and ``[[profile]]``.
        **options: keys of ``[engine]``, such as ``targets=["sm89"]``, and ``profiles=[{"batch": {...}}]``.

    Returns:
        The engine's entry in the manifest.

    Raises:
        BcaError: see errors.py; the bundle is as it was.
    """
    profiles = options.pop("profiles", None)
    library = library if library or recipe else "rtx"
    asked = read_recipe(Path(recipe) if recipe else None, {"engine": {"library": library, **options}, "profile": profiles})
    return build_recipe(Path(bundle), asked, progress or Silent())


def build_recipe(path: Path, recipe: Recipe, progress: Progress) -> EngineEntry:
    """Do what ``[engine]`` and ``[[profile]]`` of a recipe say; errors as for :func:`build`."""
    if recipe.engine is None:
        raise InputError("no engine was asked for; give --engine rtx or --engine tensorrt, or a recipe with [engine]")
    clock = Clock(progress)
    with revised(path) as (bundle, directory):
        manifest = bundle.manifest
        available = precisions(manifest)
        wanted = engines.plan(recipe.engine, recipe.profile, manifest.signature.dims, available)
        if wanted.precision not in available:
            from bca_deploy.exporter import models, plan  # torch: only where a model has to be made

            manifest = models.add_model(plan.reopen(bundle), directory, manifest, wanted.precision, clock)
        manifest = engines.add(directory, manifest, wanted, clock)
        write_build(directory, {"seconds": clock.seconds})
    return manifest.engines[-1]
