"""What PyTorch has for a model: eager, on its own fused attention, compiled, and what its exporter makes of it.

Requires: PyTorch, and of a whole model its code. Ensures: the model is the one that the bundle was made from.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from bca_deploy.benchmarking.setting import Feeds, Place, Setting, feeds_of
from bca_deploy.bundle import selftest
from bca_deploy.bundle.manifest import SELFTEST_FILE
from bca_deploy.bundle.read import Bundle
from bca_deploy.errors import InputError
from bca_deploy.exporter.plan import checkpoint_of
from bca_deploy.files import read_arrays
from bca_deploy.layers.isolation import exporter_alone
from bca_deploy.layers.lowered_model import DTYPES, lower
from bca_deploy.signature import Axis
from bca_deploy.spec import Precision
from bca_deploy.tracing.graph import trace, write
from bca_deploy.whole.factory import make
from bca_deploy.whole.samples import named_outputs
from bca_deploy.whole.swap import plain_copy
from bca_deploy.whole.traceable import distinct_sizes

if TYPE_CHECKING:
    from torch import Tensor, nn


def model_of(bundle: Bundle, place: Place | None) -> "nn.Module":
    """Return the model in float32: a bare layer from its weights, a whole model from its code.

    Raises:
        InputError: code for a bare layer, or none for a whole model.
    """
    if bundle.manifest.layer is not None:
        if place is not None:
            raise InputError(f"{bundle.source} holds a bare layer, with its weights; --model is for whole models")
        return checkpoint_of(bundle).module(torch.float32)
    if place is None:
        raise InputError(f"{bundle.source} holds a whole model, and not its code; give --model pkg.module:factory")
    return plain_copy(make(place.factory, place.checkpoint, place.prefix))


def check_model(bundle: Bundle, place: Place) -> None:
    """Refuse a model that is not the one that the bundle was made from: it must hold the bundle's own cases.

    Raises:
        InputError: with the first case that it does not hold.
    """
    manifest, model = bundle.manifest, model_of(bundle, place)
    precision = manifest.models[0].precision
    run = _runner(model, precision)
    names = [tensor.name for tensor in manifest.signature.outputs]

    def outputs(inputs: Feeds) -> dict[str, np.ndarray]:
        found = named_outputs(run(inputs)).values()
        return {name: t.double().numpy() for name, t in zip(names, found, strict=False)}

    if wrong := selftest.failures(read_arrays(bundle.path(SELFTEST_FILE)), precision, outputs):
        raise InputError(
            f"--model {place.factory} is not what {bundle.source} was made from: {wrong[0]}; give the same code, and its "
            "weights by --checkpoint"
        )


def _runner(model: "nn.Module | Callable[..., Any]", precision: Precision) -> Callable[[Feeds], Any]:
    def run(feeds: Feeds) -> Any:
        with torch.inference_mode():
            return model(**_tensors(feeds, precision))

    return run


def _tensors(feeds: Feeds, precision: Precision) -> dict[str, "Tensor"]:
    tensors = {name: torch.from_numpy(np.asarray(array)) for name, array in feeds.items()}
    return {name: t.to(DTYPES[precision]) if t.is_floating_point() else t for name, t in tensors.items()}


def runner(name: str, setting: Setting, feeds: Feeds) -> Callable[[], object]:
    """Return what runs the model once in PyTorch: ``eager``, ``sdpa`` or ``compiled``."""
    torch.set_num_threads(setting.threads)
    model = model_of(setting.bundle, setting.place).to(DTYPES[setting.precision])
    bare = setting.bundle.manifest.layer is not None
    run: Callable[..., Any] = sdpa_form(model) if name == "sdpa" or (name == "compiled" and bare) else model
    if name == "compiled":
        run = torch.compile(run)
    tensors = _tensors(feeds, setting.precision)

    def call() -> object:
        with torch.inference_mode():
            return run(**tensors)

    return call


def write_literal(bundle: Bundle, precision: Precision, path: Path) -> None:
    """Write the literal graph of a bundle's layer: one similarity, a softmax over either axis."""
    manifest = bundle.manifest
    maps = manifest.interface is not None and manifest.interface.attention_maps
    lowered = lower(checkpoint_of(bundle), "reference", precision, attention_maps=maps)
    write(trace(lowered, manifest.signature, manifest.models[0].opset), path)


def write_plain(bundle: Bundle, place: Place | None, precision: Precision, path: Path) -> None:
    """Write what PyTorch's exporter makes of the untouched model; errors as for :func:`model_of`."""
    manifest = bundle.manifest
    axes = {tensor.name: tensor.axes for tensor in manifest.signature.inputs}
    sample = _tensors(feeds_of(bundle, distinct_sizes(manifest.signature.dims)), precision)
    plain_export(model_of(bundle, place).to(DTYPES[precision]), sample, axes, path, manifest.models[0].opset)


def plain_export(
    model: "nn.Module",
    sample: Mapping[str, "Tensor"],
    axes: Mapping[str, Sequence[Axis | None]],
    path: Path,
    opset: int = 17,
    **options: Any,
) -> None:
    """Export a model as everyone does, by ``torch.onnx.export`` and nothing else.

    Args:
        model: in eval mode.
        sample: inputs by the names of forward's arguments.
        axes: of each input; what is a name is dynamic.
        path: the file. torch may write a newer opset than it was asked for.
        opset: to ask for.
        **options: more of the exporter's.
    """
    dynamic = {name: {i: axis for i, axis in enumerate(axes[name]) if isinstance(axis, str)} for name in sample}
    with exporter_alone():
        torch.onnx.export(
            model,
            kwargs=dict(sample),
            f=str(path),
            dynamo=True,
            opset_version=opset,
            input_names=list(sample),
            dynamic_shapes=dynamic,
            verbose=False,  # else it prints
            **options,
        )


def sdpa_form(layer: "nn.Module") -> Callable[..., tuple["Tensor", "Tensor"]]:
    """Return the layer on PyTorch's ``scaled_dot_product_attention``, made right at dead rows.

    A key mask inside, the mean of all values outside: what a careful user of PyTorch would write.

    Raises:
        InputError: a transformer.
    """
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
