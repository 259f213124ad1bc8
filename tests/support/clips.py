"""A bundle of a model that shares no name with the layer: frames, words and a style in, a score without a length out."""

from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper
from support.layers import make_spec

from bca_deploy.bundle.manifest import LayerEntry, Manifest, ModelEntry, ParityEntry
from bca_deploy.bundle.read import Bundle
from bca_deploy.bundle.write import seal
from bca_deploy.signature import DimRange, Dims, Signature, Tensor
from bca_deploy.spec import Interface

Arrays = dict[str, NDArray[np.generic]]

SIGNATURE = Signature(
    inputs=(
        Tensor("frames", "float32", ("clips", "time", 2, 3)),
        Tensor("words", "int64", ("clips", "tokens")),
        Tensor("style", "float32", ("clips", 5)),
        Tensor("shown", "bool", ("clips", "time"), fill=True),
        Tensor("real", "bool", ("clips", "tokens"), fill=True),
    ),
    outputs=(
        Tensor("seen", "float32", ("clips", "time", 6)),
        Tensor("said", "float32", ("clips", "tokens", 5)),
        Tensor("score", "float32", ("clips",)),
    ),
    dims=Dims(clips=DimRange(1, 2, 8), time=DimRange(1, 6, 32), tokens=DimRange(1, 4, 16)),
    batch="clips",
    masks={"time": "shown", "tokens": "real"},
)


def requested(clips: int, time: int, tokens: int, seed: int) -> Arrays:
    """Inputs, of which the masks leave the first position of every sequence."""
    random = np.random.default_rng(seed)
    masks = {"shown": random.random((clips, time)) < 0.7, "real": random.random((clips, tokens)) < 0.7}
    for mask in masks.values():
        mask[:, 0] = True
    return {
        "frames": random.integers(-8, 8, (clips, time, 2, 3)).astype(np.float32),
        "words": 2**25 + random.integers(1, 64, (clips, tokens)),
        "style": random.integers(-4, 4, (clips, 5)).astype(np.float32),
        **masks,
    }


def answered(given: Arrays) -> Arrays:
    """What the model gives, which is exact in float32: small integers alone are multiplied and added."""
    frames, style = given["frames"].astype(np.float64), given["style"].astype(np.float64)
    clips, time = frames.shape[:2]
    shown = given.get("shown", np.ones((clips, time), bool)).astype(np.float64)
    real = given.get("real", np.ones(given["words"].shape, bool)).astype(np.float64)
    words = (given["words"] - np.int64(2**25)).astype(np.float64)
    seen = frames.reshape(clips, time, 6) * shown[..., None]
    said = (words * real)[..., None] * style[:, None, :]
    score = seen.sum((1, 2)) + said.sum((1, 2))
    return {"seen": seen.astype(np.float32), "said": said.astype(np.float32), "score": score.astype(np.float32)}


def make_bundle(directory: Path, signature: Signature = SIGNATURE) -> Bundle:
    """Write it, with a self-test; with fewer outputs where the signature has fewer."""
    (directory / "models").mkdir(parents=True)
    onnx.save(_model(signature), directory / "models" / "fp32.onnx")
    given = requested(2, 3, 4, 0)
    found = {f"fp32/plain/input/{name}": array for name, array in given.items()}
    for name, array in ((t.name, answered(given)[t.name]) for t in signature.outputs):
        found |= {f"fp32/plain/output/{name}": array.astype(np.float64), f"fp32/plain/bound/{name}": np.array(0.0)}
    np.savez(directory / "selftest.npz", **found)  # type: ignore[arg-type]
    parity = ParityEntry(passed=True, scope="quick", cases=1, runtimes=("onnxruntime",), worst_ratio=1.0)
    model = ModelEntry(
        file="models/fp32.onnx", runtime="portable", opset=17, precision="fp32", lowering="fused", keep_io_types=True,
        nodes=len(_model(signature).graph.node), external_data=None, parity=parity,
    )  # fmt: skip
    # The layer and its interface are another model's: nothing that runs a bundle reads them for what goes in and out.
    manifest = Manifest(
        format=1,
        layers=(LayerEntry(path="", spec=make_spec(), lowering="fused"),),
        interface=Interface(),
        signature=signature,
        models=(model,),
        engines=(),
        versions={},
        files={},
    )
    seal(directory, manifest)
    return Bundle.open(directory)


def _model(signature: Signature) -> onnx.ModelProto:
    kinds = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64, "bool": TensorProto.BOOL}
    inputs, outputs = (
        [helper.make_tensor_value_info(t.name, kinds[t.dtype], t.axes) for t in tensors]
        for tensors in (signature.inputs, signature.outputs)
    )
    constants = {"flat": [0, 0, 6], "last": [2], "middle": [1], "both": [1, 2], "offset": [2**25]}
    nodes = [
        helper.make_node("Reshape", ["frames", "flat"], ["rows"]),
        helper.make_node("Cast", ["shown"], ["shown_1"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["shown_1", "last"], ["shown_2"]),
        helper.make_node("Mul", ["rows", "shown_2"], ["seen"]),
        helper.make_node("Sub", ["words", "offset"], ["small"]),
        helper.make_node("Cast", ["small"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["real"], ["real_1"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["numbers", "real_1"], ["kept"]),
        helper.make_node("Unsqueeze", ["kept", "last"], ["column"]),
        helper.make_node("Unsqueeze", ["style", "middle"], ["row"]),
        helper.make_node("Mul", ["column", "row"], ["said"]),
        helper.make_node("ReduceSum", ["seen", "both"], ["seen_sum"], keepdims=0),
        helper.make_node("ReduceSum", ["said", "both"], ["said_sum"], keepdims=0),
        helper.make_node("Add", ["seen_sum", "said_sum"], ["score"]),
    ]
    tensors = [helper.make_tensor(name, TensorProto.INT64, [len(v)], v) for name, v in constants.items()]
    graph = helper.make_graph(nodes, "clips", inputs, outputs, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model
