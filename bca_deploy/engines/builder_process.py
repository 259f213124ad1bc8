"""The builder process: one ONNX file in, one engine out. NVIDIA's builder can take its process with it, so it has its own.

Run as ``python -m bca_deploy.engines.builder_process`` by compile.py with a :class:`Request` as JSON on standard input. Events
go to the request's ``events`` descriptor as lines of JSON; the library's log goes to the request's ``log`` file, line by line,
so that it is whole even after a crash. Needs no package but the library.
"""

import contextlib
import json
import math
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tensorrt as trt

# One process serves one library, and which it is comes with the request: load_library() sets the name `trt`.


@dataclass(frozen=True)
class Request:
    """What to build; plain data, so that it travels as JSON.

    Attributes:
        module: the library to import.
        onnx: the model.
        out: where the engine goes.
        log: where the library's log goes.
        events: the descriptor for events.
        profiles: for each profile, each input's smallest, optimal and largest shape.
        static: fix the inputs' shapes instead of adding a profile.
        targets: compute capabilities such as ``sm89``; empty compiles for the GPU at hand.
        options: as in ``[engine]`` of a recipe.
        refit: an engine to put the model's weights into, instead of building.
    """

    module: str
    onnx: str
    out: str
    log: str = ""
    events: int = -1
    profiles: list[dict[str, list[list[int]]]] = field(default_factory=list)
    static: bool = False
    targets: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    refit: str | None = None


@dataclass
class Facts:
    """What the builder saw: element types at the edges, and how many products and weights of each type are in the graph."""

    version: str
    bytes: int
    inputs: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)
    matmuls: dict[str, int] = field(default_factory=dict)
    weights: dict[str, int] = field(default_factory=dict)


class RefusedError(Exception):
    """The library refused, or was stopped; the message is for the user."""


Tell = Callable[[str, Any], None]
_stopped = False


def main() -> None:
    """Read the request, do it, and say how it ended."""
    request = Request(**json.load(sys.stdin))
    events = os.fdopen(request.events, "w", buffering=1, encoding="utf-8")
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C reaches both processes; engine.py decides

    def tell(kind: str, value: Any) -> None:
        events.write(json.dumps({kind: value}) + "\n")

    try:
        load_library(request.module)
        tell("facts", asdict(refit(request, tell) if request.refit else build(request, tell)))
    except RefusedError as error:
        tell("refused", str(error))
    except OSError as error:
        tell("refused", f"{error.strerror or error}: {error.filename or request.out}")


def _stop(signum: int, frame: Any) -> None:
    global _stopped  # noqa: PLW0603  (a signal handler has no other place to leave word)
    _stopped = True


def load_library(module: str) -> None:
    """Import the library under the name that this module uses."""
    globals()["trt"] = import_module(module)


def build(request: Request, tell: Tell) -> Facts:
    """Parse, configure, build and write.

    Raises:
        RefusedError: the parser or the builder refused, or the build was stopped.
        OSError: the engine cannot be written.
    """
    logger = make_logger(request.log)
    builder = trt.Builder(logger)
    network, _parser = parse(builder, logger, request.onnx)
    config = configure(builder, network, request)
    config.progress_monitor = make_monitor(lambda fraction: tell("progress", fraction))
    plan = builder.build_serialized_network(network, config)
    if _stopped:
        raise RefusedError("the build was stopped")
    if plan is None:
        raise RefusedError("the builder made no engine")
    content = memoryview(plan)
    _write(request.out, content)
    _keep_timing(config, request.options)
    return facts(network, len(content))


def make_logger(path: str) -> "trt.ILogger":
    """Return a logger that writes each line at once, with its severity in front."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
            with contextlib.suppress(OSError):  # a full disk fails the build where the engine is written, not here
                os.write(handle, f"{severity.name}\t{msg}\n".encode())

    return Logger()


def make_monitor(report: Callable[[float], None]) -> "trt.IProgressMonitor":
    """Return a monitor that reports the finished share and stops the build after SIGTERM."""
    meter = Meter()

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            meter.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if meter.step(phase_name, step):
                report(meter.shown)
            return not _stopped

        def phase_finish(self, phase_name: str) -> None:
            meter.finish(phase_name)

    return Monitor()


class Meter:
    """The finished share of nested phases, from 0 to 1; it never goes back."""

    def __init__(self) -> None:
        self.phases: dict[str, tuple[str | None, int, int]] = {}
        self.shown = 0.0

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """A phase begins, as one step of its parent."""
        self.phases[name] = (parent, max(steps, 1), 0)

    def step(self, name: str, step: int) -> bool:
        """A step is done; return whether the share grew by a hundredth or more."""
        parent, steps, _ = self.phases.get(name, (None, 1, 0))
        self.phases[name] = (parent, steps, step + 1)
        share, inside = 0.0, [name]
        while name in self.phases:
            parent, steps, done = self.phases[name]
            share = min((done + share) / steps, 1.0)
            if parent is None or parent in inside:
                break
            inside.append(parent)
            name = parent
        grew = share >= self.shown + 0.01
        self.shown = share if grew else self.shown
        return grew

    def finish(self, name: str) -> None:
        """A phase is over; its parent's own step will count it."""
        self.phases.pop(name, None)


def parse(builder: "trt.Builder", logger: "trt.ILogger", onnx: str) -> "tuple[trt.INetworkDefinition, trt.OnnxParser]":
    """Parse the model into a strongly typed network: precision is what the file says.

    Returns:
        The network, and the parser, which owns the weights and has to live as long.

    Raises:
        RefusedError: with the parser's reasons and the node.
    """
    flags = trt.NetworkDefinitionCreationFlag
    # TensorRT 10 wants to be told; 11 and RTX are so in any case.
    wanted = 1 << int(flags.STRONGLY_TYPED) if hasattr(flags, "STRONGLY_TYPED") else 0
    network = builder.create_network(wanted)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(onnx):
        raise RefusedError("the parser refused the model: " + _reasons(parser))
    return network, parser


def _reasons(parser: "trt.OnnxParser | trt.OnnxParserRefitter") -> str:
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    said = [f"node {e.node_name() or '-'} ({e.node_operator() or '-'}): {e.desc()}" for e in errors]
    return "; ".join(said) or "no reason given"


def configure(builder: "trt.Builder", network: "trt.INetworkDefinition", request: Request) -> "trt.IBuilderConfig":
    """Turn the options into a builder configuration; options that a library lacks never come this far."""
    config = builder.create_builder_config()
    options = request.options
    config.max_aux_streams = options["aux_streams"]
    config.profiling_verbosity = getattr(trt.ProfilingVerbosity, _VERBOSITY[options["layer_names"]])
    if options["workspace_mib"] is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options["workspace_mib"] << 20)
    if options["optimization_level"] is not None:
        config.builder_optimization_level = options["optimization_level"]
    if options["hardware_compatibility"] != "none":
        level = options["hardware_compatibility"].upper()
        config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, level)
    _set_flags(config, options)
    _set_targets(config, request.targets)
    _set_timing(config, options)
    _set_shapes(builder, network, config, request)
    return config


_VERBOSITY = {"detailed": "DETAILED", "names": "LAYER_NAMES_ONLY", "none": "NONE"}


def _set_flags(config: "trt.IBuilderConfig", options: dict[str, Any]) -> None:
    if not options["tf32"]:
        config.clear_flag(trt.BuilderFlag.TF32)  # on by default: 10 bits of mantissa where fp32 was asked for
    if options["version_compatible"]:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options["strip_weights"]:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
        config.set_flag(trt.BuilderFlag.REFIT_IDENTICAL)
    if options["refittable"]:
        config.set_flag(trt.BuilderFlag.REFIT)


def _set_targets(config: "trt.IBuilderConfig", targets: list[str]) -> None:
    if targets:  # only RTX has these names, and only it is given targets
        config.num_compute_capabilities = len(targets)  # type: ignore[attr-defined]
        for index, target in enumerate(targets):
            config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), index)  # type: ignore[attr-defined]


def _set_timing(config: "trt.IBuilderConfig", options: dict[str, Any]) -> None:
    if options["timing_cache"] is not None:
        path = Path(options["timing_cache"])
        cache = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
        if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
            raise RefusedError(f"timing cache {path} is another TensorRT's or another GPU's; remove it, or name another")


def _keep_timing(config: "trt.IBuilderConfig", options: dict[str, Any]) -> None:
    if options["timing_cache"] is not None:
        _write(options["timing_cache"], memoryview(config.get_timing_cache().serialize()))


def _set_shapes(
    builder: "trt.Builder", network: "trt.INetworkDefinition", config: "trt.IBuilderConfig", request: Request
) -> None:
    if request.static:
        for tensor in (network.get_input(index) for index in range(network.num_inputs)):
            tensor.shape = trt.Dims(request.profiles[0][tensor.name][1])
        return
    for shapes in request.profiles:
        profile = builder.create_optimization_profile()
        for name, (low, opt, high) in shapes.items():
            profile.set_shape(name, trt.Dims(low), trt.Dims(opt), trt.Dims(high))
        if config.add_optimization_profile(profile) < 0:
            raise RefusedError(f"the builder refused the optimization profile {shapes}")


def facts(network: "trt.INetworkDefinition", size: int) -> Facts:
    """Count what is really in the graph that was built."""
    found = Facts(version=trt.__version__, bytes=size)
    found.inputs = {t.name: t.dtype.name for t in (network.get_input(i) for i in range(network.num_inputs))}
    found.outputs = {t.name: t.dtype.name for t in (network.get_output(i) for i in range(network.num_outputs))}
    matmuls: Counter[str] = Counter()
    weights: Counter[str] = Counter()
    for layer in (network.get_layer(index) for index in range(network.num_layers)):
        tensor = layer.get_output(0)
        if layer.type == trt.LayerType.MATRIX_MULTIPLY:
            matmuls[tensor.dtype.name] += 1
        elif layer.type == trt.LayerType.CONSTANT and len(tensor.shape) > 0:
            weights[tensor.dtype.name] += math.prod([int(tensor.shape[axis]) for axis in range(len(tensor.shape))])
    found.matmuls, found.weights = dict(matmuls), dict(weights)
    return found


def refit(request: Request, tell: Tell) -> Facts:
    """Put the model's weights into a copy of an engine; needs a GPU.

    Raises:
        RefusedError: the engine does not open here or takes no weights.
    """
    logger = make_logger(request.log)
    runtime = trt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(Path(request.refit or "").read_bytes())
    if engine is None:
        raise RefusedError("the engine does not open on this machine")
    refitter = trt.Refitter(engine, logger)
    parser = trt.OnnxParserRefitter(refitter, logger)
    if not parser.refit_from_file(request.onnx):
        raise RefusedError("the parser refused the new weights: " + _reasons(parser))
    if not refitter.refit_cuda_engine():
        raise RefusedError("the engine did not take the new weights")
    tell("progress", 1.0)
    content = memoryview(_serialize(engine))
    _write(request.out, content)
    network, _parser = parse(trt.Builder(logger), logger, request.onnx)
    return facts(network, len(content))


def _serialize(engine: "trt.ICudaEngine") -> "trt.IHostMemory":
    """Return the engine with its weights, ready to be refitted again where the library can say so (10.14 and later)."""
    serializing = engine.create_serialization_config()
    serializing.clear_flag(trt.SerializationFlag.EXCLUDE_WEIGHTS)
    if hasattr(trt.SerializationFlag, "INCLUDE_REFIT"):
        serializing.set_flag(trt.SerializationFlag.INCLUDE_REFIT)
    return engine.serialize_with_config(serializing)


def _write(path: str, content: memoryview) -> None:
    """Write beside the place and rename: what is there is whole or absent."""
    partial = Path(f"{path}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
