"""Where the layer stands in a state dict: containers, a choice that is said, and what stands in its stead."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.layers import make_checkpoint, make_spec
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import bca_deploy
from bca_deploy.errors import CheckpointError
from bca_deploy.layers.checkpoint import Checkpoint, from_module, from_state, load
from bca_deploy.layers.reference import build

State = dict[str, Tensor]

ONE, OTHER = make_checkpoint(1).state, make_checkpoint(2).state


def is_of(found: Checkpoint, state: State) -> bool:
    return all(torch.equal(found.state[name], tensor) for name, tensor in state.items())


def prefixed(prefix: str, state: State) -> State:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("content", "prefix"),
    [
        ({"generator": ONE}, "generator"),
        ({"net": {"module": ONE}}, "net.module."),
        ({"state_dict": {"generator": {"module": prefixed("fusion.", ONE)}}}, "generator.module.fusion"),
        ({"state_dict": prefixed("model.fusion.", ONE)}, "fusion"),
        ({"state_dict": prefixed("model.fusion.", ONE)}, "model.fusion"),
        ({"state_dict": prefixed("model.fusion.", ONE)}, "state_dict.model.fusion"),
        ([{"a": OTHER}, ONE], "1"),
    ],
    ids=str,
)
def test_containers_are_walked_as_prefixes(tmp_path: Path, content: Any, prefix: str) -> None:
    torch.save({"checkpoints": content} if isinstance(content, list) else content, tmp_path / "a.pt")
    assert is_of(load(tmp_path / "a.pt", 3, f"checkpoints.{prefix}" if isinstance(content, list) else prefix), ONE)


@pytest.mark.parametrize("inside", ["", "fusion."])
def test_of_model_and_ema_either_is_reached_and_the_choice_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, inside: str
) -> None:
    torch.save({"ema": prefixed(inside, OTHER), "model": prefixed(inside, ONE), "step": torch.tensor(3)}, tmp_path / "a.ckpt")
    assert is_of(load(tmp_path / "a.ckpt", 3, inside), ONE)
    said = f"the checkpoint has more than one: 'model.{inside}' is taken, and not 'ema.{inside}'; --prefix takes another"
    assert [record.getMessage() for record in caplog.records] == [said]
    caplog.clear()
    assert is_of(load(tmp_path / "a.ckpt", 3, f"ema.{inside}"), OTHER)
    assert is_of(load(tmp_path / "a.ckpt", 3, f"model.{inside}"), ONE)
    assert not caplog.records


def test_one_container_alone_is_no_choice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save({"model": ONE, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}}, tmp_path / "a.pt")
    assert is_of(load(tmp_path / "a.pt", 3), ONE)
    assert not caplog.records


# ---- in its stead


def layer() -> Any:
    return build(make_spec())


def _parametrised(module: Any) -> None:
    parametrizations.orthogonal(module.to_v)


def _weight_normalised(module: Any) -> None:
    parametrizations.weight_norm(module.context_to_out)


def _pruned(module: Any) -> None:
    prune.l1_unstructured(module.to_qk, "weight", 0.5)


def _renamed(**names: str) -> Callable[[State], State]:
    return lambda state: {re.sub("|".join(names), lambda m: names[m[0]], name): tensor for name, tensor in state.items()}


LIVE: dict[str, tuple[Callable[[Any], None], str]] = {
    "parametrised": (_parametrised, r"to_v is parametrised.*remove_parametrizations\(layer\.to_v, \"weight\"\)"),
    "weight norm": (_weight_normalised, r"context_to_out is parametrised"),
    "pruned": (_pruned, r"to_qk is pruned.*torch\.nn\.utils\.prune\.remove\(layer\.to_qk, \"weight\"\)"),
}


@pytest.mark.parametrize("kind", list(LIVE))
def test_a_projection_whose_weight_is_made_of_others_is_named_with_the_way_to_merge(tmp_path: Path, kind: str) -> None:
    change, said = LIVE[kind]
    change(module := layer())
    torch.save(prefixed("model.", module.state_dict()), tmp_path / "a.pt")
    for read in (lambda: from_module(module), lambda: load(tmp_path / "a.pt", 3), lambda: load(tmp_path / "a.pt", 3, "model")):
        with pytest.raises(CheckpointError, match=rf"the layer's {said}"):
            read()


def without(state: State, *names: str) -> State:
    return {name: tensor for name, tensor in state.items() if name not in names}


ADDED = torch.ones(2)
SAVED: dict[str, tuple[State, str]] = {
    "peft": (
        without(ONE, "to_v.weight") | {"to_v.base_layer.weight": ONE["to_v.weight"], "to_v.lora_A.default.weight": ADDED},
        r"to_v is adapted \(LoRA\).*merge_and_unload\(\)",
    ),
    "loralib": (ONE | {"to_qk.lora_A": ADDED, "to_qk.lora_B": ADDED}, r"to_qk is adapted \(LoRA\)"),
    "adapter alone": ({"base_model.model.cross.to_qk.lora_A.weight": ADDED}, r"to_qk is adapted \(LoRA\)"),
    "old weight norm": (without(ONE, "to_v.weight") | {"to_v.weight_g": ADDED, "to_v.weight_v": ADDED}, r"to_v is weight-norm"),
    "spectral norm": (without(ONE, "to_qk.weight") | {"to_qk.weight_orig": ADDED, "to_qk.weight_u": ADDED}, r"to_qk is spect"),
    "dynamic": (
        without(ONE, "to_qk.weight") | {"to_qk._packed_params._packed_params": ADDED, "to_qk.scale": ADDED},
        r"to_qk is quantised.*from before the quantisation",
    ),
    "gptq": (without(ONE, "to_out.weight") | {"to_out.qweight": ADDED, "to_out.qzeros": ADDED}, "to_out is quantised"),
    "bitsandbytes": (ONE | {"to_qk.weight.absmax": ADDED, "to_qk.weight.quant_map": ADDED}, "to_qk is quantised"),
}


@pytest.mark.parametrize("prefix", ["", "cross."])
@pytest.mark.parametrize("kind", list(SAVED))
def test_a_saved_projection_of_several_tensors_is_named_with_the_way_to_merge(kind: str, prefix: str) -> None:
    state, said = SAVED[kind]
    with pytest.raises(CheckpointError, match=rf"the layer's {said}"):
        from_state(prefixed(prefix, state), 3, prefix)


def test_adapters_of_other_layers_do_not_matter() -> None:
    other = {"unet.to_v.lora_A.weight": ADDED, "unet.to_v.base_layer.weight": ADDED}
    assert is_of(from_state(prefixed("cross.", ONE) | other, 3, "cross"), ONE)
    with pytest.raises(CheckpointError, match=r"layers are at: 'cross\.'; use --prefix"):
        from_state(prefixed("cross.", ONE) | other, 3)


DIFFERENT: dict[str, tuple[State, str]] = {
    "bias": (ONE | {"to_qk.bias": ADDED}, r"unknown key to_qk\.bias"),
    "gate": (ONE | {"gate.weight": ADDED}, r"unknown key gate\.weight"),
    "sequence": (
        without(ONE, "to_out.weight", "to_out.bias") | {"to_out.0.weight": ONE["to_out.weight"], "to_out.0.bias": ADDED},
        r"unknown key to_out\.0\.weight .*missing key to_out\.weight",
    ),
}


@pytest.mark.parametrize("prefix", ["", "model.cross."])
@pytest.mark.parametrize("kind", list(DIFFERENT))
def test_a_different_layer_is_called_different(kind: str, prefix: str) -> None:
    state, named = DIFFERENT[kind]
    with pytest.raises(CheckpointError, match=rf"{named}.*a different layer.*--keep-literal") as caught:
        from_state(prefixed(prefix, state), 3, prefix)
    assert "--prefix" not in str(caught.value)


# ---- a module that holds the layer


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cross, self.head = layer(), nn.Linear(24, 2)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        found: Tensor = self.head(self.cross(x, context)[0])
        return found


@pytest.mark.parametrize(
    ("make", "part"),
    [(Model, r"model\.cross"), (lambda: nn.ModuleDict({"blocks": nn.ModuleList([Model()])}), r"model\.blocks\[0\]\.cross")],
)
def test_a_module_that_holds_the_layer_is_told_which_part_to_pass(make: Callable[[], nn.Module], part: str) -> None:
    said = rf"no layer at the root of the module; layers are at: .*; pass {part}, or export the whole model with samples"
    with pytest.raises(CheckpointError, match=said):
        from_module(make())


def test_a_module_in_an_attribute_called_model_is_not_taken_for_it() -> None:
    module = nn.Module()
    module.model = layer()
    with pytest.raises(CheckpointError, match=r"pass model\.model, or"):
        from_module(module)


@pytest.mark.parametrize("prefix", ["cross", "cross."])
def test_prefix_exports_a_part_of_a_module(tmp_path: Path, prefix: str) -> None:
    model = Model()
    sizes = {"batch": (1, 1, 2), "x_len": (1, 3, 4), "context_len": (1, 3, 4)}
    with bca_deploy.export(model, tmp_path / "m", prefix=prefix, dims=sizes) as bundle:
        assert bundle.manifest.layer == from_module(model.cross).spec
    with pytest.raises(bca_deploy.BcaError, match=r"prefix 'cros': the Model has no such part \(did you mean 'cross'\?\)"):
        bca_deploy.export(model, tmp_path / "n", prefix="cros")
