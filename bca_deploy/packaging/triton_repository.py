"""From a bundle to a Triton model repository: the engine model, and in front of it packaging/triton_front.py."""

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import TypeAdapter

from bca_deploy import optional
from bca_deploy.bundle.manifest import EngineEntry, signature_of, signature_of_engine
from bca_deploy.bundle.read import Bundle
from bca_deploy.engines.profiles import shapes
from bca_deploy.engines.usable import why_stale
from bca_deploy.errors import EngineError, InputError, check_one_of
from bca_deploy.packaging.placing import Placing, together
from bca_deploy.serving.protocol import DATATYPE, described
from bca_deploy.signature import Dims, Signature, Tensor

Runtime = Literal["auto", "tensorrt", "onnxruntime"]

#: What the front runs besides itself: the package's own rules, which need numpy alone.
_CARRIED = ("arithmetic.py", "errors.py", "signature.py", "session/__init__.py", "session/contract.py", "session/padding.py")


@dataclass(frozen=True)
class Options:
    """What goes into the repository.

    Attributes:
        name: of the model that clients call; the engine model behind it is ``<name>_engine``.
        runtime: ``auto`` takes the bundle's ``tensorrt`` engine where it has one, else onnxruntime.
        tensorrt_version: of the server, where it is known; an engine that it would not load is refused.
        max_batch: rows that the front takes at once; more than an engine run holds, so that similar lengths find each other,
            and never fewer, so that whatever the engine takes gets through.
        max_delay_ms: how long the first request waits for more.
        max_queue: requests that may wait.
    """

    name: str = "bca"
    runtime: Runtime = "auto"
    tensorrt_version: str | None = None
    max_batch: int = 64
    max_delay_ms: float = 5.0
    max_queue: int = 256


@dataclass(frozen=True)
class _Engine:
    """What the engine model loads: its backend, files to copy by their new names, and what it takes."""

    backend: str
    platform: str
    files: dict[str, Path]
    signature: Signature
    profiles: tuple[Dims, ...]
    version: str | None = None
    version_compatible: bool = False
    by_capability: dict[str, str] | None = None


def write(bundle: Bundle, root: Path, options: Options) -> list[Path]:
    """Write the two models into the model repository ``root``; see :func:`stage`."""
    with together() as placing:
        return stage(bundle, root, options, placing)


def stage(bundle: Bundle, root: Path, options: Options, placing: Placing) -> list[Path]:
    """Make the two models for the model repository ``root``, which may hold others.

    Returns:
        Where their directories will be, the front first.

    Raises:
        InputError: they are there already, the runtime is not known, or the model's element types cannot pass through
            Triton's python backend.
        EngineError: the bundle has no such engine, or the server would not load it.
        MissingDependencyError: tritonclient is not installed.
    """
    check_one_of("runtime", options.runtime, get_args(Runtime))
    engine = _choose(bundle, options)
    targets = [root / options.name, root / f"{options.name}_engine"]
    for target in targets:
        if target.exists():
            raise InputError(f"{target} exists; remove it, or choose another directory or --name")
    if "bfloat16" in {tensor.dtype for tensor in engine.signature.inputs}:
        raise InputError("Triton's python backend has no bfloat16; export with --keep-io-types, or another precision")
    _write_front(placing.staged(targets[0]), engine, options)
    _write_engine(placing.staged(targets[1]), f"{options.name}_engine", engine)
    return targets


def _choose(bundle: Bundle, options: Options) -> _Engine:
    engines = [entry for entry in bundle.manifest.engines if entry.library == "tensorrt"]
    if options.runtime == "tensorrt" and not engines:
        raise EngineError(f"the bundle has no tensorrt engine; build one: bca build {bundle.source} --engine tensorrt")
    if options.runtime == "onnxruntime" or not engines:
        return _onnx(bundle)
    return _tensorrt(bundle, engines, options.tensorrt_version)


def _onnx(bundle: Bundle) -> _Engine:
    model = next(model for model in bundle.manifest.models if model.runtime == "portable")
    files = {"model.onnx": bundle.path(model.file)}
    if model.external_data:
        files[Path(model.external_data).name] = bundle.path(model.external_data)  # the model looks for it by that name
    return _Engine(
        "onnxruntime", "onnxruntime_onnx", files, signature_of(bundle.manifest, model), (bundle.manifest.signature.dims,)
    )


def _tensorrt(bundle: Bundle, engines: list[EngineEntry], loaded: str | None) -> _Engine:
    """Return the engines like the first one: one for each GPU generation they were built on."""
    first = engines[0]
    alike = [entry for entry in engines if _kind(entry) == _kind(first)]
    for entry in alike:
        reason = why_stale(entry, bundle.manifest, loaded)
        if reason:
            raise EngineError(f"{entry.file} cannot be served: {reason}")
    names = {entry.file: f"{Path(entry.file).stem}.plan" for entry in alike}
    files = {names[entry.file]: bundle.path(entry.file) for entry in alike}
    capabilities = {_capability(e.gpu.compute_capability): names[e.file] for e in alike if e.gpu}
    return _Engine(
        "tensorrt", "tensorrt_plan", files, signature_of_engine(bundle.manifest, first), first.profiles,
        first.version, first.options.version_compatible, capabilities,
    )  # fmt: skip


def _kind(entry: EngineEntry) -> tuple[object, ...]:
    return entry.precision, entry.version, entry.options.version_compatible, entry.profiles


def _capability(name: str) -> str:
    """From ``sm90`` to Triton's ``9.0``."""
    digits = name.removeprefix("sm")
    return f"{digits[:-1]}.{digits[-1]}"


def _write_engine(directory: Path, model: str, engine: _Engine) -> None:
    pb = _messages()
    config = pb.ModelConfig(name=model, backend=engine.backend, platform=engine.platform, max_batch_size=0)
    for tensor in engine.signature.inputs:
        config.input.append(pb.ModelInput(name=tensor.name, data_type=_type(tensor), dims=described(tensor.axes)))
    _add_outputs(config, engine.signature.outputs)
    config.default_model_filename = next(iter(engine.files))
    config.cc_model_filenames.update(engine.by_capability or {})
    if engine.version:
        config.parameters["tensorrt_version"].string_value = engine.version
        group = pb.ModelInstanceGroup(kind=pb.ModelInstanceGroup.KIND_GPU, count=1)
        group.profile.extend(str(index) for index in range(len(engine.profiles)))
        config.instance_group.append(group)
    config.model_warmup.extend(_warmups(engine))
    _save(directory, config)
    for name, source in engine.files.items():
        shutil.copyfile(source, directory / "1" / name)


def _warmups(engine: _Engine) -> Iterable[Any]:
    """Yield a request of the optimal sizes of each profile, so that no client waits for the first kernels."""
    pb = _messages()
    for index, dims in enumerate(engine.profiles):
        optimal = shapes(dims, engine.signature.inputs)
        warmup = pb.ModelWarmup(name=f"profile {index}", batch_size=1, count=1)
        for tensor in engine.signature.inputs:
            _, shape, _ = optimal[tensor.name]
            warmup.inputs[tensor.name].CopyFrom(pb.ModelWarmup.Input(data_type=_type(tensor), dims=shape, zero_data=True))
        yield warmup


def _write_front(directory: Path, engine: _Engine, options: Options) -> None:
    pb, signature, together = _messages(), engine.signature, _together(engine.signature)
    rows = max(options.max_batch, signature.dims[signature.batch].max if signature.batch else 0)  # Triton refuses more
    config = pb.ModelConfig(name=options.name, backend="python", max_batch_size=rows if together else 0)
    for tensor in engine.signature.inputs:
        entry = pb.ModelInput(name=tensor.name, data_type=_type(tensor), dims=described(tensor.axes)[together:])
        entry.optional = tensor.fill is not None
        entry.allow_ragged_batch = together
        config.input.append(entry)
    _add_outputs(config, engine.signature.outputs, skip=together)
    if together:
        config.dynamic_batching.max_queue_delay_microseconds = round(options.max_delay_ms * 1000)
        config.dynamic_batching.default_queue_policy.max_queue_size = options.max_queue
    config.instance_group.append(pb.ModelInstanceGroup(kind=pb.ModelInstanceGroup.KIND_CPU, count=1))
    _save(directory, config)
    _copy_code(directory / "1")
    facts = _facts(engine, f"{options.name}_engine")
    (directory / "1" / "front.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def _together(signature: Signature) -> bool:
    """Whether Triton may hand over several requests at once: it takes no tensor that has a batch and nothing else."""
    return signature.pads and all(len(tensor.axes) > 1 for tensor in (*signature.inputs, *signature.outputs))


def _facts(engine: _Engine, name: str) -> dict[str, Any]:
    return {
        "engine": name,
        "tensorrt_version": engine.version,
        "version_compatible": engine.version_compatible,
        "signature": TypeAdapter(Signature).dump_python(engine.signature, mode="json"),
        "profiles": TypeAdapter(tuple[Dims, ...]).dump_python(engine.profiles, mode="json"),
    }


def _copy_code(version: Path) -> None:
    package = version / "bca_deploy"
    (package / "session").mkdir(parents=True)
    (package / "__init__.py").write_text('"""What the front needs of bca-deploy, unchanged."""\n', encoding="utf-8")
    source = Path(__file__).parents[1]
    for name in _CARRIED:
        shutil.copyfile(source / name, package / name)
    shutil.copyfile(source / "packaging" / "triton_front.py", version / "model.py")


def _add_outputs(config: Any, outputs: tuple[Tensor, ...], skip: bool = False) -> None:
    pb = _messages()
    for tensor in outputs:
        config.output.append(pb.ModelOutput(name=tensor.name, data_type=_type(tensor), dims=described(tensor.axes)[skip:]))


def _type(tensor: Tensor) -> Any:
    return _messages().DataType.Value(f"TYPE_{DATATYPE[tensor.dtype]}")


def _save(directory: Path, config: Any) -> None:
    from google.protobuf import text_format

    (directory / "1").mkdir(parents=True)
    (directory / "config.pbtxt").write_text(text_format.MessageToString(config), encoding="utf-8")


def _messages() -> Any:
    return optional.load("tritonclient.grpc.model_config_pb2", "tritonclient", "package")
