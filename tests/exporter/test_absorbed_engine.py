"""Which form absorbed projections take in an engine: the one that needs the least memory, said in the manifest."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from support.grounding_dino_layer import Fusion, fusion_layer, sample

import bca_deploy
from bca_deploy.exporter.recipe import read_recipe
from bca_deploy.exporter.wholes import memory
from bca_deploy.layers.checkpoint import Checkpoint
from bca_deploy.spec import AbsorbedForm
from bca_deploy.whole.find import find
from bca_deploy.whole.uses import Use

FOUNDS = find(Fusion(fusion_layer()))


def chosen(monkeypatch: pytest.MonkeyPatch, needs: Mapping[str, int], **options: Any) -> dict[str, Any]:
    """Return the choice where a builder says these needs."""

    def scratch(checkpoint: Checkpoint, form: AbsorbedForm, *rest: Any) -> int:
        return needs[form]

    monkeypatch.setattr(memory, "_scratch", scratch)
    recipe = read_recipe(None, {"precision": ["fp16"], **options})
    return memory.least_memory(FOUNDS, {"layer.attn": Use(1, True, False, False, (600, 200))}, 4, recipe)


def test_the_form_that_needs_the_least_is_taken_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = {"library": "rtx", "targets": ["sm89"]}
    found = chosen(monkeypatch, {"flat": 3_000_000, "loopq": 2_000_000, "expand": 2_500_000}, engine=engine)
    why = "scratch memory of the fp16 engine at 4x600x200, MB: flat 3.0, loopq 2.0, expand 2.5"
    assert found == {"layer.attn": ("loopq", why)}


def test_without_an_engine_nothing_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(monkeypatch, {}) == {}


@pytest.mark.parametrize(("text_len", "form"), [(128, "flat"), (129, "loopq")])
def test_by_rule_the_form_follows_the_longest_text(text_len: int, form: str) -> None:
    use = Use(1, True, False, False, (600, text_len))
    assert use.lowering(FOUNDS[0]) == form
    assert use.lowering(FOUNDS[0], "onnxruntime-cpu") == "flat"
    assert str(text_len) in str(use.reason(FOUNDS[0]))


@pytest.mark.slow
def test_a_real_builder_chooses_and_the_bundle_is_made_again_as_it_was(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    pair, model = [sample(2, 40, 12), sample(3, 45, 14, seed=1)], Fusion(fusion_layer()).eval()
    dims = {"batch": (1, 1, 4), "vision_len": (1, 50, 600), "text_len": (1, 16, 200)}
    engine = {"library": "rtx", "targets": ["sm89"]}
    bundle = bca_deploy.export(model, tmp_path / "b", inputs=pair, precision=["fp16"], engine=engine, dims=dims)
    (layer,) = bundle.manifest.layers
    assert layer.why is not None
    listed = dict(each.split() for each in layer.why.partition("MB: ")[2].split(", "))
    assert layer.lowering == min(listed, key=lambda form: float(listed[form]))
    assert bundle.manifest.engines[0].attentions_fused is None
    verdicts = bca_deploy.verify(bundle.directory, model=model)
    assert all(verdicts)
