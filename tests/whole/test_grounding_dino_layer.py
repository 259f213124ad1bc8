"""GroundingDINO's fusion attention inside a model: found, proven, absorbed; and what its literal graph does in float16."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from support.grounding_dino_layer import HEADS, Bare, Fusion, Shown, fusion_layer, sample, sharpen
from torch import nn

import bca_deploy
from bca_deploy.benchmarking.torch_forms import plain_export
from bca_deploy.errors import CheckpointError, ExportError, ParityError
from bca_deploy.layers.checkpoint import from_module
from bca_deploy.layers.lowered_model import lower
from bca_deploy.parity.strict_evaluator import strict_runner
from bca_deploy.spec import AbsorbedForm
from bca_deploy.whole.find import find

Arrays = dict[str, NDArray[Any]]
Run = Callable[[Arrays], Arrays]
AXES = {
    "vision": ("batch", "vision_len", None),
    "text": ("batch", "text_len", None),
    "vision_mask": ("batch", "vision_len"),
    "text_mask": ("batch", "text_len"),
}


@pytest.mark.parametrize("mm", [False, True])
def test_it_is_found_and_proven_in_both_of_its_packages(mm: bool) -> None:
    (found,) = find(Fusion(fusion_layer(mm=mm)))
    assert (found.path, found.checkpoint.spec.family, found.checkpoint.spec.heads) == ("layer.attn", "grounding-dino", HEADS)
    assert found.proof.cases >= 12
    assert found.proof.worst < 1e-12


def test_another_scale_is_told_with_its_case() -> None:
    layer = fusion_layer()
    layer.attn.scale *= 2
    with pytest.raises(ParityError, match=r"layer\.attn: .*computes something else.*--keep-literal layer\.attn"):
        find(Fusion(layer))


def test_a_layer_with_more_than_the_family_has_is_refused_by_name() -> None:
    layer = fusion_layer()
    layer.attn.talking_heads = nn.Conv2d(HEADS, HEADS, 1)
    with pytest.raises(CheckpointError, match=r"talking_heads.*, which GroundingDINO's fusion attention has not"):
        find(Fusion(layer))


def test_attention_maps_that_show_are_refused_with_the_way_out(tmp_path: Path) -> None:
    pair = [sample(2, 5, 4), sample(3, 6, 7, seed=1)]
    with pytest.raises(ExportError, match=r"layer\.attn: its attention maps show .*--keep-literal layer\.attn"):
        bca_deploy.export(Shown(fusion_layer()), tmp_path / "b", inputs=pair)


@pytest.mark.parametrize("form", ["flat", "loopq", "expand"])
@pytest.mark.parametrize("masked", [False, True])
def test_every_form_is_the_reference(form: AbsorbedForm, masked: bool) -> None:
    checkpoint = from_module(fusion_layer().attn)
    ours, reference = lower(checkpoint, form, masked=masked), checkpoint.module(torch.float64)
    inputs = sample(3, 11, 5)
    given = {"x": inputs["vision"], "context": inputs["text"]}
    given |= {"mask": inputs["vision_mask"], "context_mask": inputs["text_mask"]} if masked else {}
    wanted = reference(**{name: t if t.dtype == torch.bool else t.double() for name, t in given.items()})
    for got, true in zip(ours(**given), wanted, strict=True):
        assert (got - true).abs().max() < 1e-6 * true.abs().max()


# ---- float16


def halved(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: t.half() if t.is_floating_point() else t for name, t in inputs.items()}


_SLOW = pytest.mark.slow  # an export


class Graphs:
    """The literal graph of a model and ours, both float16 and run strictly."""

    def __init__(self, model: nn.Module, folder: Path) -> None:
        pair = [sample(2, 40, 12, seed=1), sample(3, 45, 14, seed=2)]
        plain_export(copy.deepcopy(model).half(), halved(pair[0]), AXES, folder / "literal.onnx")
        options = {"precision": ["fp16"], "keep_io_types": False}
        bundle = bca_deploy.export(model, folder / "bundle", inputs=pair, **options)
        self.literal = strict_runner(onnx.load(folder / "literal.onnx"))
        self.ours = strict_runner(onnx.load(bundle.path("models/fp16.onnx")))
        self.exact = copy.deepcopy(model).half().double()  # of the weights that both graphs hold

    def errors(self, inputs: dict[str, torch.Tensor]) -> dict[str, float]:
        """Return the RMS error of the image's output, as a share of its own RMS, of either graph."""
        halves = halved(inputs)
        with torch.no_grad():
            wanted = self.exact(**{n: t.double() if t.is_floating_point() else t for n, t in halves.items()})[0].numpy()
        fed = {n: t.numpy() for n, t in halves.items()}
        got = {"literal": self.literal(fed), "ours": self.ours(fed)}
        return {name: rms(next(iter(found.values())).astype(float) - wanted) / rms(wanted) for name, found in got.items()}


def rms(values: NDArray[Any]) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


@_SLOW
def test_one_sharp_head_rounds_all_others_in_the_literal_graph_and_none_in_ours(tmp_path: Path) -> None:
    layer = fusion_layer()
    sharpen(layer, 600.0, head=0)
    found = Graphs(Fusion(layer).eval(), tmp_path).errors(sample(2, 40, 12, seed=3))
    assert found["ours"] < 1e-3
    assert found["literal"] > 5 * found["ours"]


@_SLOW
def test_a_sharp_batch_mate_moves_the_literal_graph_and_not_ours(tmp_path: Path) -> None:
    """The literal graph subtracts one maximum for the whole tensor."""
    graphs = Graphs(Bare(fusion_layer()).eval(), tmp_path)
    fed = {name: tensor.numpy() for name, tensor in halved(sample(2, 40, 12, seed=4)).items()}
    mate = {name: array.copy() for name, array in fed.items()}
    mate["vision"][1] *= 500

    def moved(run: Run) -> float:
        pairs = zip(run(fed).values(), run(mate).values(), strict=True)
        return max(float(np.abs(a[0].astype(float) - b[0]).max()) for a, b in pairs)

    assert moved(graphs.ours) == 0
    assert moved(graphs.literal) > 0.01
