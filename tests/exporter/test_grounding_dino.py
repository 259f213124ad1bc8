"""GroundingDINO of transformers, whole and as it is imported, at opset 17: batch and length of the text are free."""

from collections.abc import Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from support.detectors import IMAGE, LONGEST, TOLD, detection, grounding_dino
from torch import Tensor, nn
from transformers.models.grounding_dino import modeling_grounding_dino as modeling

import bca_deploy
from bca_deploy.bundle.read import Bundle
from bca_deploy.errors import ExportError
from bca_deploy.signature import DimRange, Dims
from bca_deploy.tracing.graph import Traceable, convert

DIMS = {"batch": (1, 2, 4), "input_ids_len": (1, 9, LONGEST)}
SAMPLES = [detection(0, 3, 7), detection(1, 2, 9)]


def functions() -> dict[str, Any]:
    """Everything that runs in transformers' module of the model, and in its classes."""
    found = {}
    for name, value in vars(modeling).items():
        members = vars(value).items() if isinstance(value, type) else [("", value)]
        found |= {f"{name}.{member}": each for member, each in members if isinstance(each, FunctionType)}
    return found


def assert_untouched(before: dict[str, Any], codes: dict[str, Any]) -> None:
    after = functions()
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] and after[name].__code__ is codes[name] for name in before)


@pytest.fixture(autouse=True)
def untouched() -> Iterator[None]:
    before = functions()
    codes = {name: each.__code__ for name, each in before.items()}
    assert len(codes) > 50
    yield
    assert_untouched(before, codes)


class Phrases(nn.Module):
    """What holds the operators that torch's exporter has no form for: which words are of one phrase."""

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        marks = torch.tensor(modeling.SPECIAL_TOKENS)
        found: tuple[Tensor, Tensor] = modeling.generate_masks_with_special_tokens_and_transfer_map(input_ids, marks)
        return found


def test_the_words_of_a_phrase_are_found_as_in_pytorch() -> None:
    inputs = {"input_ids": SAMPLES[0]["input_ids"]}
    dims = Dims({"batch": DimRange(1, 2, 4), "length": DimRange(1, 9, LONGEST)})
    graph, _ = convert(Traceable(Phrases().eval(), inputs, {"input_ids": ("batch", "length")}, dims, ("mask", "places")), 17)
    session = ort.InferenceSession(ir.to_proto(graph).SerializeToString(), providers=["CPUExecutionProvider"])
    for seed, (batch, length) in enumerate([(1, 1), (1, 2), (2, 17), (3, 6), (2, LONGEST)]):
        words = detection(seed, batch, length)["input_ids"]
        for got, wanted in zip(session.run(None, {"input_ids": words.numpy()}), Phrases()(words), strict=True):
            np.testing.assert_array_equal(got, wanted.numpy(), strict=True)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bundle]:
    before = functions()
    codes = {name: each.__code__ for name, each in before.items()}
    out = tmp_path_factory.mktemp("detector") / "bundle"
    with bca_deploy.export(grounding_dino(), out, inputs=SAMPLES, dims=DIMS, **TOLD) as made:
        assert_untouched(before, codes)
        yield made


@pytest.mark.slow
def test_the_whole_detector_is_one_graph_of_opset_17(bundle: Bundle) -> None:
    (model,) = (each for each in bundle.manifest.models if each.runtime == "portable")
    assert model.parity.passed
    proto = onnx.load(bundle.path(model.file))
    assert {entry.domain: entry.version for entry in proto.opset_import} == {"": 17}
    onnx.checker.check_model(proto, full_check=True)
    assert {layer.spec.family for layer in bundle.manifest.layers} == {"grounding-dino"}
    signature = bundle.manifest.signature
    assert {tensor.name: tensor.axes for tensor in signature.inputs} == {
        "pixel_values": ("batch", 3, IMAGE, IMAGE),
        "input_ids": ("batch", "input_ids_len"),
        "attention_mask": ("batch", "input_ids_len"),
    }
    assert {tensor.name: tensor.axes for tensor in signature.outputs}["logits"] == ("batch", 10, 256)
    assert (signature.dims["input_ids_len"].max, signature.batch) == (LONGEST, "batch")


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 4), (1, 1), (3, 17), (2, 6), (4, 32), (1, LONGEST)], ids=str)
def test_boxes_and_logits_are_pytorchs_at_every_size(bundle: Bundle, sizes: tuple[int, int]) -> None:
    given = detection(7, *sizes)
    with torch.no_grad():
        wanted = grounding_dino()(**given)
    with bca_deploy.open(bundle.directory) as session:
        got = session.run({name: tensor.numpy() for name, tensor in given.items()})
    for name in ("logits", "pred_boxes"):  # logits are -inf behind the text: assert_allclose wants the same infinity
        np.testing.assert_allclose(got[name], wanted[name].numpy(), rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.slow
def test_the_bundle_proves_its_logits_infinite_ones_too(bundle: Bundle) -> None:
    with bca_deploy.open(bundle.directory) as session:
        session.selftest()
    arrays = np.load(bundle.path("selftest.npz"))
    logits = [name for name in arrays.files if name.endswith("output/logits")]
    assert logits
    assert all(np.isneginf(arrays[name]).any() for name in logits)


@pytest.mark.slow
def test_a_text_that_the_model_would_cut_is_refused_and_the_lengths_that_work_are_said(tmp_path: Path) -> None:
    dims = {**DIMS, "input_ids_len": (1, 9, 300)}
    said = rf"input_ids_len 257 to 300: the model branches on .* declare `--dim input_ids_len=1:9:{LONGEST}`"
    with pytest.raises(ExportError, match=said):
        bca_deploy.export(grounding_dino(), tmp_path / "out", inputs=SAMPLES, dims=dims, **TOLD)
    assert not (tmp_path / "out").exists()
