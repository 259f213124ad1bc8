"""The engines of a bundle: decide what to build, build it into a staged bundle, prove what came out, refuse what is stale.

Needs no torch and no onnx: the models are in the bundle already.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bca_deploy.bundle.engine_options import EngineTable
from bca_deploy.bundle.manifest import EngineEntry, GpuEntry, Manifest, ModelEntry, model_of, signature_of
from bca_deploy.bundle.write import seal, write_build
from bca_deploy.engines import build_log, libraries
from bca_deploy.engines.builder_process import Request
from bca_deploy.engines.compile import Built, compile_engine
from bca_deploy.engines.gpus import query
from bca_deploy.engines.libraries import DTYPES
from bca_deploy.engines.profiles import is_static, resolve, shapes
from bca_deploy.errors import EngineError, InputError, ParityError
from bca_deploy.progress import Clock
from bca_deploy.signature import DimRange, Dims, Signature
from bca_deploy.spec import DTYPE_OF, Precision

_BYTES: dict[Precision, int] = {"fp32": 4, "fp16": 2, "bf16": 2}


@dataclass(frozen=True)
class EnginePlan:
    """An engine to build, everything decided and checked.

    Attributes:
        library: which of NVIDIA's.
        precision: of the model that is compiled.
        targets: compute capabilities; empty for the GPU at hand.
        profiles: ranges of the named dimensions, at least one.
        options: the rest.
        gpu: the GPU at hand, where the library builds for that.
    """

    library: libraries.Library
    precision: Precision
    targets: tuple[str, ...]
    profiles: tuple[Dims, ...]
    options: EngineTable
    gpu: GpuEntry | None


def plan(
    table: EngineTable, profiles: tuple[Mapping[str, DimRange], ...], dims: Dims, available: tuple[Precision, ...]
) -> EnginePlan:
    """Decide what to build; nothing is written.

    Args:
        table: what was asked for.
        profiles: the optimization profiles asked for, where a dimension left out has the range of ``dims``; none means one
            over all of them.
        dims: of the bundle.
        available: precisions of its models; the first half precision there is the default, else fp16.

    Raises:
        InputError: a target, option or profile that cannot be.
        EngineError: the library needs a GPU and there is none.
        MissingDependencyError: the library is not installed.
    """
    library = libraries.LIBRARIES[table.library]
    _check_options(library, table)
    halves = [precision for precision in available if precision != "fp32"]
    precision = table.precision or (halves[0] if halves else "fp16")
    targets = libraries.check_targets(library, table.targets, precision)
    ranges = resolve(profiles, dims)
    gpu = _gpu(library) if library.needs_gpu else None
    libraries.load(table.library)
    return EnginePlan(library, precision, targets, ranges, table, gpu)


def _check_options(library: libraries.Library, table: EngineTable) -> None:
    for name, reason in library.lacks.items():
        if getattr(table, name) not in (False, None, "none"):
            raise InputError(f"engine.{name} with --engine {library.name}: {reason}")
    if table.strip_weights and table.refittable:
        raise InputError("engine.strip_weights and engine.refittable: a stripped engine is refitted anyway; give one of them")


def _gpu(library: libraries.Library) -> GpuEntry:
    gpus = query()
    if not gpus.found:
        raise EngineError(
            f"--engine {library.name} builds on the GPU that the engine is for, and here is none: {gpus.why_none}; "
            "build on the GPU machine, or ahead of time with --engine rtx"
        )
    return gpus.found[0]


def add(directory: Path, manifest: Manifest, wanted: EnginePlan, clock: Clock) -> Manifest:
    """Build an engine into a staged bundle; one of the same library, precision and GPU is replaced.

    Args:
        directory: the staged bundle.
        manifest: its manifest.
        wanted: from :func:`plan`.
        clock: times the build.

    Returns:
        The manifest with the engine, written.

    Raises:
        EngineError: the builder failed, or made something else than was asked for.
        ParityError: the model is one that failed.
    """
    model = model_of(manifest, wanted.precision)
    if not model.parity.passed:
        raise ParityError(f"{model.file} failed parity, and is never compiled; export the bundle again without --keep-failed")
    gpu = f"-{wanted.gpu.compute_capability}" if wanted.gpu else ""
    file = f"engines/{wanted.library.name}-{wanted.precision}{gpu}.engine"
    (directory / "engines").mkdir(exist_ok=True)
    with clock.stage(f"engine {wanted.library.name} {wanted.precision}"):
        request = _request(directory, manifest, model, wanted, file)
        built = compile_engine(
            request, wanted.options.time_limit_s, lambda share: clock.progress.steps(round(100 * share), 100)
        )
    entry = _entry(manifest, model, wanted, file, built)
    _check_network(entry, built.facts.inputs | built.facts.outputs, signature_of(manifest, model))
    return record(directory, manifest, entry, built)


def record(directory: Path, manifest: Manifest, entry: EngineEntry, built: Built) -> Manifest:
    """Write an engine that lies in a staged bundle into its manifest and build.json."""
    others = tuple(engine for engine in manifest.engines if engine.file != entry.file)
    write_build(directory, {"engines": {entry.file: {"seconds": built.seconds, "warnings": list(built.log.warnings)}}})
    return seal(directory, manifest.model_copy(update={"engines": (*others, entry)}))


def _request(directory: Path, manifest: Manifest, model: ModelEntry, wanted: EnginePlan, file: str) -> Request:
    inputs = manifest.signature.inputs
    return Request(
        module=wanted.library.module,
        onnx=str(directory / model.file),
        out=str(directory / file),
        profiles=[{k: [list(s) for s in v] for k, v in shapes(p, inputs).items()} for p in wanted.profiles],
        static=is_static(wanted.profiles),
        targets=list(wanted.targets),
        options=wanted.options.model_dump(mode="json"),
    )


def _entry(manifest: Manifest, model: ModelEntry, wanted: EnginePlan, file: str, built: Built) -> EngineEntry:
    ordinary = [layer for layer in manifest.layers if not layer.spec.kin.absorbed]  # of the others some forms have none
    each = sum(2 * layer.calls * (layer.spec.depth or 1) for layer in ordinary)
    attentions = each * len(wanted.profiles)  # the log lists every profile's kernels
    fused, evidence = build_log.judge_fusion(built.log, attentions, _map_bytes(manifest, wanted))
    return EngineEntry(
        file=file,
        library=wanted.library.name,
        version=built.facts.version,
        model=model.file,
        model_sha256=manifest.files[model.file].sha256,
        precision=wanted.precision,
        targets=wanted.targets,
        gpu=wanted.gpu,
        profiles=wanted.profiles,
        static=is_static(wanted.profiles),
        matmuls=_by_dtype(built.facts.matmuls),
        weights=_by_dtype(built.facts.weights),
        scratch_bytes=built.log.scratch_bytes,
        weight_bytes=built.log.weight_bytes,
        attentions_fused=fused,
        fusion_evidence=evidence,
        options=wanted.options.options,
    )


def _map_bytes(manifest: Manifest, wanted: EnginePlan) -> int:
    """Size of one attention map of the bare layer at the largest shapes; 0 where the lengths inside are not known."""
    if manifest.layer is None:
        return 0
    largest = max(math.prod(profile.at("max").values()) for profile in wanted.profiles)
    return largest * manifest.layer.heads * _BYTES[wanted.precision]


def _by_dtype(counts: Mapping[str, int]) -> dict[str, int]:
    return {DTYPES[name]: count for name, count in sorted(counts.items()) if name in DTYPES}


def _check_network(entry: EngineEntry, seen: Mapping[str, str], signature: Signature) -> None:
    """Refuse an engine whose products are not all in the precision asked for, or whose tensors are not the model's."""
    tensors = {name: DTYPES.get(kind, kind) for name, kind in seen.items()}
    wanted = {tensor.name: tensor.dtype for tensor in (*signature.inputs, *signature.outputs)}
    if set(entry.matmuls) != {DTYPE_OF[entry.precision]} or tensors != wanted:
        raise EngineError(
            f"{entry.precision} was asked for with the tensors {wanted}, but the network multiplies in {entry.matmuls} and has "
            f"{tensors}; please report this"
        )
