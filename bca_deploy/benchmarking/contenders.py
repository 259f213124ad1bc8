"""What `bca bench` sets beside the session: the same model in PyTorch three ways, and on other runtimes four.

Requires: a bundle; PyTorch for its own contenders, and of a whole model the code. Ensures: each computes the model right at
dead rows as well, or is left out with the reason.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

from bca_deploy import optional
from bca_deploy.benchmarking.setting import Feeds, Setting
from bca_deploy.bundle.manifest import Manifest
from bca_deploy.spec import Precision

Name = Literal["eager", "sdpa", "compiled", "plain", "literal", "portable", "openvino", "session"]
#: Every contender; the session comes last.
NAMES: tuple[Name, ...] = get_args(Name)
#: Those of ``--quick``: what people have today, and what a bundle gives them.
QUICK: tuple[Name, ...] = ("eager", "plain", "portable", "session")

_OF_TORCH = ("eager", "sdpa", "compiled", "plain", "literal")
_OF_ONNXRUNTIME = ("plain", "literal", "portable")


def obstacle(
    name: Name,
    manifest: Manifest,
    installed: Callable[[str], bool],
    precision: Precision = "fp32",
    code: bool = False,
) -> str | None:
    """Say why a contender cannot run this bundle here; None where it can.

    Args:
        name: which.
        manifest: of the bundle.
        installed: whether a package is.
        precision: to run in.
        code: whether a whole model's code was given.
    """
    need = "torch" if name in _OF_TORCH else "openvino" if name == "openvino" else None
    if need and not installed(need):
        return f"{need} is not installed"
    if precision == "bf16" and name in _OF_ONNXRUNTIME:
        return "onnxruntime has no bfloat16 matrix product on the CPU"
    return _not_of_layer(name, manifest) if manifest.layer else _not_of_model(name, code)


def _not_of_layer(name: Name, manifest: Manifest) -> str | None:
    layer, interface = manifest.layer, manifest.interface
    if layer is None or interface is None or name not in ("sdpa", "compiled"):
        return None
    if layer.depth or layer.talking_heads or interface.attention_maps:
        return "PyTorch's fused attention takes a bare layer without talking heads and attention maps"
    return None


def _not_of_model(name: Name, code: bool) -> str | None:
    if name in ("sdpa", "literal"):
        return "it is a form of the bare layer"
    if name in _OF_TORCH and not code:
        return "a whole model's code is not in its bundle; give --model"
    return None


def prepare(name: Name, setting: Setting) -> None:
    """Write the graph that a contender needs and the bundle has not."""
    if name not in ("plain", "literal"):
        return
    from bca_deploy.benchmarking import torch_forms

    if name == "plain":
        torch_forms.write_plain(setting.bundle, setting.place, setting.precision, setting.file(name))
    else:
        torch_forms.write_literal(setting.bundle, setting.precision, setting.file(name))


def contender(name: Name, setting: Setting, feeds: Feeds) -> Callable[[], object]:
    """Return what runs the model once on ``feeds``.

    Args:
        name: which.
        setting: under what; :func:`prepare` was called for it.
        feeds: inputs by name, floats in float32.
    """
    portable = setting.bundle.path(setting.portable.file)
    if name == "session":
        return _session(setting, feeds)
    if name == "portable":
        return _onnxruntime(portable, setting.threads, setting.cast(feeds))
    if name == "literal":
        return _onnxruntime(setting.file(name), setting.threads, feeds)
    if name == "plain":
        return _plain(setting, feeds)
    if name == "openvino":
        return _openvino(portable, setting, setting.cast(feeds))
    from bca_deploy.benchmarking import torch_forms

    return torch_forms.runner(name, setting, feeds)


def _session(setting: Setting, feeds: Feeds) -> Callable[[], object]:
    from bca_deploy.session.opening import open_session

    how = {"precision": setting.precision, "threads": setting.threads}
    session = open_session(setting.bundle.source, setting.backend, **how, verify="off")  # type: ignore[arg-type]
    return lambda: session(**feeds, cast=True)


def _plain(setting: Setting, feeds: Feeds) -> Callable[[], object]:
    """PyTorch's exporter gives the edges the precision that is inside."""
    halves = {name: array.astype("float16") if array.dtype.kind == "f" else array for name, array in feeds.items()}
    return _onnxruntime(setting.file("plain"), setting.threads, feeds if setting.precision == "fp32" else halves)


def _onnxruntime(path: Path, threads: int, feeds: Feeds) -> Callable[[], object]:
    ort = optional.onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    taken = {entry.name for entry in session.get_inputs()}  # PyTorch's exporter drops what nothing reads
    given = {name: array for name, array in feeds.items() if name in taken}
    return lambda: session.run(names, given)


def _openvino(path: Path, setting: Setting, feeds: Feeds) -> Callable[[], object]:
    openvino = optional.load("openvino", "openvino", "bench")
    inside = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}[setting.precision]
    hints = {"INFERENCE_NUM_THREADS": setting.threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": inside}
    request = openvino.Core().compile_model(str(path), "CPU", hints).create_infer_request()
    return lambda: request.infer(dict(feeds))
