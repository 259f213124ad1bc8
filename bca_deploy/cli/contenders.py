"""What `bca bench` sets beside the session: the same layer in PyTorch three ways, and on onnxruntime two.

Requires: a bundle; PyTorch for its own contenders. Ensures: each computes the layer right at dead rows as well, or is left out
with the reason.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from bca_deploy import optional
from bca_deploy.bundle.manifest import Manifest
from bca_deploy.bundle.read import Bundle
from bca_deploy.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn


Array = NDArray[Any]
Feeds = Mapping[str, Array]
Name = Literal["eager", "sdpa", "compiled", "literal", "portable", "openvino", "session"]
#: Every contender; the session comes last.
NAMES: tuple[Name, ...] = get_args(Name)
LITERAL_FILE = "literal.onnx"


def obstacle(name: Name, manifest: Manifest, installed: Callable[[str], bool]) -> str | None:
    """Say why a contender cannot run this bundle here; None where it can."""
    need = {"eager": "torch", "sdpa": "torch", "compiled": "torch", "literal": "torch", "openvino": "openvino"}.get(name)
    if need and not installed(need):
        return f"{need} is not installed"
    layer, interface = manifest.layer, manifest.interface
    if need == "torch" and (layer is None or interface is None):
        return "a whole model's code is not in its bundle"
    if (
        layer is not None
        and interface is not None
        and name in ("sdpa", "compiled")
        and (layer.depth or layer.talking_heads or interface.attention_maps)
    ):
        return "PyTorch's fused attention takes a bare layer without talking heads and attention maps"
    if name in ("literal", "portable", "openvino") and not any(m.precision == "fp32" for m in manifest.models):
        return "it runs float32, and the bundle has none"
    return None


def write_literal(bundle: Bundle, directory: Path) -> None:
    """Write the literal graph of a bundle's layer: one similarity, a softmax over either axis."""
    from bca_deploy.exporter.plan import checkpoint_of
    from bca_deploy.layers.lowered_model import lower
    from bca_deploy.tracing.graph import trace, write

    manifest = bundle.manifest
    maps = manifest.interface is not None and manifest.interface.attention_maps
    lowered = lower(checkpoint_of(bundle), "reference", attention_maps=maps)
    write(trace(lowered, manifest.signature, manifest.models[0].opset), directory / LITERAL_FILE)


def contender(name: Name, bundle: Bundle, directory: Path, threads: int, backend: str, feeds: Feeds) -> Callable[[], object]:
    """Return what runs the layer once on ``feeds``.

    Args:
        name: which.
        bundle: the bundle.
        directory: where :func:`write_literal` wrote.
        threads: that it may use on the CPU.
        backend: the session's.
        feeds: float32 inputs and masks.
    """
    if name == "session":
        return _session(bundle, threads, backend, feeds)
    if name in ("literal", "portable"):
        portable = next(m for m in bundle.manifest.models if m.precision == "fp32" and m.runtime == "portable")
        return _onnxruntime(directory / LITERAL_FILE if name == "literal" else bundle.path(portable.file), threads, feeds)
    if name == "openvino":
        portable = next(m for m in bundle.manifest.models if m.precision == "fp32" and m.runtime == "portable")
        return _openvino(bundle.path(portable.file), threads, feeds)
    return _torch(name, bundle, threads, feeds)


def _session(bundle: Bundle, threads: int, backend: str, feeds: Feeds) -> Callable[[], object]:
    from bca_deploy.session.opening import open_session

    session = open_session(bundle.source, backend, threads=threads, verify="off")
    return lambda: session(**feeds, cast=True)


def _onnxruntime(path: Path, threads: int, feeds: Feeds) -> Callable[[], object]:
    from bca_deploy.optional import onnxruntime

    ort = onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda: session.run(names, dict(feeds))


def _openvino(path: Path, threads: int, feeds: Feeds) -> Callable[[], object]:
    openvino = optional.load("openvino", "openvino", "bench")
    hints = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    request = openvino.Core().compile_model(str(path), "CPU", hints).create_infer_request()
    return lambda: request.infer(dict(feeds))


def _torch(name: Name, bundle: Bundle, threads: int, feeds: Feeds) -> Callable[[], object]:
    import torch

    from bca_deploy.exporter.plan import checkpoint_of

    torch.set_num_threads(threads)
    layer = checkpoint_of(bundle).module(torch.float32)
    tensors = {key: torch.from_numpy(np.asarray(array)) for key, array in feeds.items()}
    run: Callable[..., Any] = layer if name == "eager" else sdpa_form(layer)
    if name == "compiled":
        run = torch.compile(run)

    def call() -> object:
        with torch.inference_mode():
            return run(**tensors)

    return call


def sdpa_form(layer: "nn.Module") -> Callable[..., tuple["Tensor", "Tensor"]]:
    """Return the layer on PyTorch's ``scaled_dot_product_attention``, made right at dead rows.

    A key mask inside, the mean of all values outside: what a careful user of PyTorch would write.

    Raises:
        InputError: a transformer.
    """
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    if not hasattr(layer, "to_qk"):
        raise InputError("PyTorch's fused attention takes the place of a bare layer's, not of a transformer's")
    made: Any = layer

    def heads(t: "Tensor") -> "Tensor":
        return t.reshape(*t.shape[:2], made.heads, -1).transpose(1, 2)

    def one_way(q: "Tensor", k: "Tensor", v: "Tensor", own: "Tensor", other: "Tensor", bias: "Tensor | None") -> "Tensor":
        keys = other[:, None, None, :]
        if bias is not None:
            keys = torch.where(keys, bias, torch.finfo(bias.dtype).min)
        attended = scaled_dot_product_attention(q, k, v, attn_mask=keys, scale=made.scale)
        live = own & other.any(-1, keepdim=True)
        merged = torch.where(live[:, None, :, None], attended, v.mean(-2, keepdim=True))
        return merged.transpose(1, 2).flatten(-2)

    def run(
        x: "Tensor",
        context: "Tensor",
        mask: "Tensor | None" = None,
        context_mask: "Tensor | None" = None,
        rel_pos_bias: "Tensor | None" = None,
    ) -> tuple["Tensor", "Tensor"]:
        own = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
        other = torch.ones(context.shape[:2], dtype=torch.bool) if context_mask is None else context_mask
        x, context = made.norm(x), made.context_norm(context)
        qk, context_qk = heads(made.to_qk(x)), heads(made.context_to_qk(context))
        turned = None if rel_pos_bias is None else rel_pos_bias.transpose(-1, -2)
        out = one_way(qk, context_qk, heads(made.context_to_v(context)), own, other, rel_pos_bias)
        context_out = one_way(context_qk, qk, heads(made.to_v(x)), other, own, turned)
        return made.to_out(out), made.context_to_out(context_out)

    return run
