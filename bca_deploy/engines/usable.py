"""Which engine of a bundle may run here; a stale one is refused with the command that rebuilds it."""

import json
import shlex
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from bca_deploy.bundle.engine_options import BuildOptions
from bca_deploy.bundle.manifest import EngineEntry, Manifest
from bca_deploy.bundle.read import Bundle
from bca_deploy.engines import libraries
from bca_deploy.errors import EngineError
from bca_deploy.signature import Dims
from bca_deploy.spec import EngineLibrary, Precision


def why_stale(entry: EngineEntry, manifest: Manifest, loaded: str | None, capability: str | None = None) -> str | None:
    """Say why an engine must not be used.

    Args:
        entry: the engine.
        manifest: of its bundle.
        loaded: version of the library that would load it; None skips the check.
        capability: of the GPU that would run it, such as ``sm89``; None skips the check.

    Returns:
        The reason, or None where it may be used.
    """
    model = manifest.files.get(entry.model)
    if model is None or model.sha256 != entry.model_sha256:
        return f"{entry.model} has changed since it was built"
    if loaded is not None and not _loads(entry, loaded):
        return f"it was built by {entry.library} {entry.version}, and {loaded} is installed"
    if capability is not None and not _runs(entry, capability):
        built_for = ", ".join(entry.targets) or (entry.gpu.compute_capability if entry.gpu else "another GPU")
        return f"it was built for {built_for}, and the GPU is {capability}"
    return None


def _loads(entry: EngineEntry, loaded: str) -> bool:
    """Exactly the version that built it; a version-compatible engine also loads in later ones."""
    numbers = [tuple(int(n) for n in text.split(".") if n.isdecimal()) for text in (entry.version, loaded)]
    return numbers[1] >= numbers[0] if entry.options.version_compatible else numbers[1] == numbers[0]


def _runs(entry: EngineEntry, capability: str) -> bool:
    if entry.gpu is None:
        return capability in entry.targets
    built = entry.gpu.compute_capability
    if entry.options.hardware_compatibility == "ampere_plus":
        return int(capability[2:]) >= 80
    return capability == built


def rebuild_command(entry: EngineEntry, bundle: Path | str) -> str:
    """Return the command that builds the engine again."""
    parts = ["bca", "build", str(bundle), "--engine", entry.library, "--precision", entry.precision]
    parts += [part for target in entry.targets for part in ("--target", target)]
    parts += [part for profile in entry.profiles for part in ("--profile", _as_flag(profile))]
    return shlex.join([*parts, *_option_flags(entry.options)])


def _option_flags(options: BuildOptions) -> list[str]:
    """Return what differs from the defaults as ``--set``."""
    default, flags = BuildOptions(), []
    for name in sorted(BuildOptions.model_fields):
        value = getattr(options, name)
        if value != getattr(default, name):
            flags += ["--set", f"engine.{name}={json.dumps(value) if isinstance(value, bool) else value}"]
    return flags


def _as_flag(profile: Dims) -> str:
    return ",".join(f"{name}={r.min}:{r.opt}:{r.max}" for name, r in profile.items())


def of_library(bundle: Bundle, library: EngineLibrary, precision: Precision | None = None) -> list[EngineEntry]:
    """Return the bundle's engines for a library.

    Raises:
        EngineError: there is none, with the command that builds one.
    """
    asked = f" --precision {precision}" if precision else ""
    found = [e for e in bundle.manifest.engines if e.library == library and precision in (None, e.precision)]
    if not found:
        kind = f"{library} engine of precision {precision}" if precision else f"{library} engine"
        raise EngineError(f"{bundle.source} has no {kind}; build one: bca build {bundle.source} --engine {library}{asked}")
    return found


def engine_for(
    bundle: Bundle, library: EngineLibrary, loaded: str, capability: str, precision: Precision | None = None
) -> tuple[EngineEntry, Path]:
    """Return the bundle's engine for a library and a GPU.

    Raises:
        EngineError: there is none, or every one is stale; with each reason and the command that rebuilds it.
    """
    reasons = []
    for entry in of_library(bundle, library, precision):
        reason = why_stale(entry, bundle.manifest, loaded, capability)
        if reason is None:
            return entry, bundle.path(entry.file)
        reasons.append(f"{entry.file} is stale: {reason}; rebuild it: {rebuild_command(entry, bundle.source)}")
    raise EngineError("; ".join(reasons))


def installed(library: EngineLibrary) -> str | None:
    """Return the installed version of a library, without importing it; None where it is not installed."""
    for package in libraries.LIBRARIES[library].packages:
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return None
