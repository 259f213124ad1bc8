"""Checkpoints: what is read, what is inferred, what is refused and in which words."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bidirectional_cross_attention as published
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from support.layers import make_checkpoint, make_spec
from support.rounding import assert_same as assert_same_results
from torch import Tensor, nn

from bca_deploy.errors import CheckpointError, InputError
from bca_deploy.layers.checkpoint import Checkpoint, from_module, from_state, infer, load
from bca_deploy.layers.reference import build
from bca_deploy.layers.stored.weight_files import read
from bca_deploy.spec import LayerSpec

State = dict[str, Tensor]

SUFFIXES = (".pt", ".pth", ".safetensors")
TRANSFORMER: dict[str, Any] = {"prenorm": True, "norm": "rms", "depth": 2, "ff_hidden": 10, "context_ff_hidden": 14}

few = settings(max_examples=40, deadline=None, derandomize=True, report_multiple_bugs=False)


def save(state: State, path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


def prefixed(prefix: str, state: State) -> State:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def without(state: State, name: str) -> State:
    return {key: tensor for key, tensor in state.items() if key != name}


def assert_same(found: Checkpoint, wanted: Checkpoint) -> None:
    assert found.spec == wanted.spec
    assert set(found.state) == set(wanted.state)
    for name, tensor in wanted.state.items():
        assert found.state[name].dtype == tensor.dtype, name
        assert torch.equal(found.state[name], tensor), name


# Files


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("options", [{}, {"prenorm": True, "talking_heads": True}, TRANSFORMER], ids=["bare", "full", "deep"])
def test_file_round_trip_gives_back_the_same_layer(tmp_path: Path, suffix: str, options: dict[str, Any]) -> None:
    wanted = make_checkpoint(**options)
    assert_same(load(save(wanted.state, tmp_path / f"model{suffix}"), heads=3), wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_original_dtype_is_kept(tmp_path: Path, suffix: str, dtype: torch.dtype) -> None:
    state = {name: tensor.to(dtype) for name, tensor in make_checkpoint(prenorm=True).state.items()}
    found = load(save(state, tmp_path / f"model{suffix}"), heads=3)
    assert {tensor.dtype for tensor in found.state.values()} == {dtype}
    assert all(torch.equal(found.state[name], tensor) for name, tensor in state.items())


def test_mixed_dtypes_are_kept_tensor_by_tensor() -> None:
    state = make_checkpoint(prenorm=True).state
    mixed = {name: tensor if "norm" in name else tensor.half() for name, tensor in state.items()}
    assert {n: t.dtype for n, t in from_state(mixed, 3).state.items()} == {n: t.dtype for n, t in mixed.items()}


def test_older_torch_files_are_read(tmp_path: Path) -> None:
    wanted = make_checkpoint()
    torch.save(wanted.state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert_same(load(tmp_path / "old.pt", heads=3), wanted)


def test_module_computes_what_the_trained_module_computed() -> None:
    torch.manual_seed(0)
    module = build(make_spec(prenorm=True), dropout=0.5).eval()
    x, context = torch.randn(2, 4, 24), torch.randn(2, 3, 16)
    rebuilt = from_state(module.state_dict(), 3).module(torch.float32)
    assert not rebuilt.training
    assert_same_results(rebuilt(x, context), module(x, context))


def test_module_rounds_to_the_dtype_asked_for_and_leaves_the_checkpoint_alone() -> None:
    checkpoint = make_checkpoint(prenorm=True)
    half = checkpoint.module(torch.float16).state_dict()
    assert all(torch.equal(half[name], tensor.half()) for name, tensor in checkpoint.state.items())
    assert {tensor.dtype for tensor in checkpoint.state.values()} == {torch.float32}


# Where the layer sits, and what wraps it

WRAPPERS: dict[str, Callable[[State], Any]] = {
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "model": lambda state: {"model": state, "optimizer": {"lr": 1e-3, "state": {}}},
    "model_state_dict": lambda state: {"model_state_dict": state},
    "module.": lambda state: prefixed("module.", state),
    "_orig_mod.": lambda state: prefixed("_orig_mod.", state),
    "module._orig_mod.": lambda state: prefixed("module._orig_mod.", state),
    "_orig_mod.module.": lambda state: prefixed("_orig_mod.module.", state),
    "module.module.": lambda state: prefixed("module.module.", state),
    "state_dict of model": lambda state: {"state_dict": {"model": state}},
    "state_dict of module._orig_mod.": lambda state: {"state_dict": prefixed("module._orig_mod.", state)},
}


@pytest.mark.parametrize("options", [{}, TRANSFORMER], ids=["layer", "transformer"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_are_taken_off(tmp_path: Path, wrapper: str, options: dict[str, Any]) -> None:
    wanted = make_checkpoint(**options)
    torch.save(WRAPPERS[wrapper](wanted.state), tmp_path / "model.pt")
    assert_same(load(tmp_path / "model.pt", heads=3), wanted)


def test_orig_mod_is_taken_off_in_the_middle_of_names() -> None:
    wanted = make_checkpoint(**TRANSFORMER)
    compiled = {re.sub(r"^(layers\.\d\.)", r"\1_orig_mod.", name): tensor for name, tensor in wanted.state.items()}
    compiled = {re.sub(r"\.0\.(to_|context_to_)", r".0._orig_mod.\1", name): tensor for name, tensor in compiled.items()}
    assert set(compiled).isdisjoint(wanted.state)
    assert_same(from_state(compiled, 3), wanted)


def inside_a_model(state: State, prefix: str) -> State:
    """A bigger state dict with integers and NaN in what is none of our business."""
    other = {
        "head.weight": torch.full((2, 2), torch.nan),
        "steps": torch.tensor(7),
        f"{prefix.partition('.')[0]}2.bias": torch.ones(3),
    }
    return other | prefixed(prefix, state)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("options", [{"prenorm": True}, TRANSFORMER], ids=["layer", "transformer"])
def test_prefix_finds_the_layer_inside_a_bigger_state_dict(tmp_path: Path, suffix: str, options: dict[str, Any]) -> None:
    wanted = make_checkpoint(**options)
    path = save(inside_a_model(wanted.state, "encoder.fusion."), tmp_path / f"model{suffix}")
    for prefix in ("encoder.fusion.", "encoder.fusion"):
        assert_same(load(path, heads=3, prefix=prefix), wanted)


@pytest.mark.parametrize("prefix", ["encoder.fusion", "encoder._orig_mod.fusion._orig_mod."])
def test_prefix_and_wrappers_go_together(tmp_path: Path, prefix: str) -> None:
    wanted = make_checkpoint()
    state = prefixed("module.", inside_a_model(wanted.state, "encoder._orig_mod.fusion._orig_mod."))
    torch.save({"state_dict": state}, tmp_path / "model.pt")
    assert_same(load(tmp_path / "model.pt", heads=3, prefix=prefix), wanted)


def test_prefix_can_point_at_one_layer_of_a_transformer() -> None:
    wanted = make_checkpoint(**TRANSFORMER)
    found = from_state(wanted.state, 3, "layers.1.0.")
    assert found.spec == wanted.spec.attention
    assert torch.equal(found.state["to_v.weight"], wanted.state["layers.1.0.to_v.weight"])


def test_prefix_picks_one_of_two_layers() -> None:
    first, second = make_checkpoint(1), make_checkpoint(2, talking_heads=True)
    state = prefixed("a.", first.state) | prefixed("ab.", second.state)
    assert_same(from_state(state, 3, "a"), first)
    assert_same(from_state(state, 3, "ab"), second)


# Inference

HEADS = st.sampled_from([1, 2, 3])


@st.composite
def specs(draw: st.DrawFn) -> LayerSpec:
    size = st.integers(1, 9)
    sizes = {"dim": draw(size), "context_dim": draw(size), "heads": draw(HEADS), "dim_head": draw(size)}
    mixed = draw(st.booleans())
    if draw(st.booleans()):
        prenorm = draw(st.booleans())
        norm = draw(st.sampled_from(["layer", "rms"])) if prenorm else "layer"
        return LayerSpec(**sizes, prenorm=prenorm, norm=norm, talking_heads=mixed)  # type: ignore[arg-type]
    final = draw(st.booleans())
    sizes |= {"context_dim": sizes["dim"]} if final else {}
    sizes |= {"depth": draw(st.integers(1, 3)), "ff_hidden": draw(size), "context_ff_hidden": draw(size)}
    return LayerSpec(**sizes, prenorm=True, norm="rms", talking_heads=mixed, final_norms=final)


@few
@given(spec=specs())
def test_everything_but_heads_is_inferred_from_names_and_shapes(spec: LayerSpec) -> None:
    state = build(spec).state_dict()
    assert infer(state, spec.heads) == spec
    if spec.talking_heads:
        assert infer(state) == spec, "talking heads say how many there are"
    found = from_state(prefixed("module.a.", state) | {"module.b": torch.ones(1)}, spec.heads, "a")
    assert found.spec == spec
    found.module(torch.float64)


@pytest.mark.parametrize(
    ("options", "inferred"),
    [
        ({}, {"prenorm": False, "norm": "layer", "norm_eps": 1e-5, "depth": None, "talking_heads": False}),
        ({"prenorm": True}, {"prenorm": True, "norm": "layer", "norm_eps": 1e-5}),
        ({"prenorm": True, "norm": "rms"}, {"prenorm": True, "norm": "rms", "norm_eps": 1.1920929e-07}),
        ({"talking_heads": True}, {"talking_heads": True, "heads": 3, "dim_head": 8}),
        (TRANSFORMER, {"depth": 2, "ff_hidden": 10, "context_ff_hidden": 14, "final_norms": False, "prenorm": True}),
        (TRANSFORMER | {"context_dim": 24, "final_norms": True}, {"final_norms": True, "context_dim": 24}),
    ],
    ids=["bare", "layer norm", "rms norm", "talking heads", "transformer", "final norms"],
)
def test_inferred_from_a_saved_state(options: dict[str, Any], inferred: dict[str, Any]) -> None:
    spec = from_state(make_checkpoint(**options).state, 3).spec
    sizes = {"dim": 24, "context_dim": 16, "heads": 3, "dim_head": 8}
    wanted = sizes | inferred
    assert {name: getattr(spec, name) for name in wanted} == wanted


def test_blocks_are_counted_past_nine() -> None:
    state = make_checkpoint(**TRANSFORMER | {"depth": 11}).state
    assert from_state(state, 3).spec.depth == 11


@pytest.mark.parametrize("heads", [1, 2, 4, 6, 24])
def test_the_heads_given_are_the_heads_used(heads: int) -> None:
    spec = from_state(make_checkpoint().state, heads).spec
    assert (spec.heads, spec.dim_head) == (heads, 24 // heads)


# Heads are never guessed


@pytest.mark.parametrize("options", [{}, {"prenorm": True}, TRANSFORMER], ids=["bare", "prenorm", "transformer"])
def test_without_heads_the_error_lists_the_divisors(options: dict[str, Any]) -> None:
    reason = r"heads cannot be read .* give --heads, one of the divisors of the inner width 24: 1, 2, 3, 4, 6, 8, 12, 24$"
    with pytest.raises(InputError, match=reason):
        from_state(make_checkpoint(**options).state)


@pytest.mark.parametrize("heads", [5, 48, 0, -3])
def test_heads_that_do_not_divide_are_refused_with_those_that_do(heads: int) -> None:
    reason = rf"heads {heads} does not divide the inner width 24; allowed: 1, 2, 3, 4, 6, 8, 12, 24$"
    with pytest.raises(InputError, match=reason):
        from_state(make_checkpoint().state, heads)


@pytest.mark.parametrize("options", [{}, TRANSFORMER], ids=["layer", "transformer"])
def test_heads_that_contradict_the_talking_heads_are_refused(options: dict[str, Any]) -> None:
    state = make_checkpoint(talking_heads=True, **options).state
    with pytest.raises(InputError, match=r"heads 4, but the talking-heads weights are for 3; leave --heads out or give 3"):
        from_state(state, 4)


def test_talking_heads_that_do_not_divide_the_inner_width_are_refused() -> None:
    state = make_checkpoint(talking_heads=True).state
    state |= {name: torch.ones(5, 5, 1, 1) for name in state if "talking" in name}
    with pytest.raises(
        CheckpointError, match=r"shapes do not fit one layer of dim 24, context_dim 16: .*to_qk\.weight \[24, 24\]"
    ):
        from_state(state)


@pytest.mark.parametrize("shape", [(), (3,)], ids=str)
def test_talking_heads_of_the_wrong_rank_are_refused(shape: tuple[int, ...]) -> None:
    state = make_checkpoint(talking_heads=True).state | {"talking_heads.weight": torch.ones(shape)}
    with pytest.raises(CheckpointError, match=r"talking_heads\.weight"):
        from_state(state)


# Keys and shapes


@pytest.mark.parametrize("name", sorted(make_checkpoint(prenorm=True, talking_heads=True).state))
def test_a_missing_key_of_the_layer_is_named(name: str) -> None:
    state = make_checkpoint(prenorm=True, talking_heads=True).state
    with pytest.raises(CheckpointError, match=rf"(missing key |key |no ){re.escape(name)}\b"):
        from_state(without(state, name), 3)


FULL_TRANSFORMER = TRANSFORMER | {"context_dim": 24, "final_norms": True}


@pytest.mark.parametrize("name", sorted(make_checkpoint(**FULL_TRANSFORMER).state))
def test_a_missing_key_of_the_transformer_is_named(name: str) -> None:
    state = make_checkpoint(**FULL_TRANSFORMER).state
    with pytest.raises(CheckpointError, match=rf"(missing key |key |no ){re.escape(name)}\b"):
        from_state(without(state, name), 3)


@pytest.mark.parametrize("name", ["to_out.bias", "context_to_v.weight", "context_norm.bias"])
def test_a_misspelt_key_is_named_with_the_nearest_match(name: str) -> None:
    state = make_checkpoint(prenorm=True).state
    typo = name.replace("to_", "two_").replace("norm", "nrom")
    state[typo] = state.pop(name)
    expected = (
        rf"unknown key {re.escape(typo)} \(did you mean '{re.escape(name)}'\?\); missing key {re.escape(name)}; .*--prefix"
    )
    with pytest.raises(CheckpointError, match=expected):
        from_state(state, 3)


def test_a_missing_matrix_is_named_with_the_nearest_match() -> None:
    state = make_checkpoint().state
    state["context_to_k.weight"] = state.pop("context_to_qk.weight")
    with pytest.raises(
        CheckpointError, match=r"key context_to_qk\.weight is missing \(did you mean 'context_to_k\.weight'\?\)"
    ):
        from_state(state, 3)


def test_unknown_keys_beside_a_complete_layer_are_refused() -> None:
    state = make_checkpoint().state | {"to_qk.bias": torch.ones(24)}
    with pytest.raises(CheckpointError, match=r"unknown key to_qk\.bias \(did you mean 'to_\w+\.\w+'\?\); .*exactly one layer"):
        from_state(state, 3)


def test_a_long_list_of_unknown_keys_is_cut_and_counted() -> None:
    state = make_checkpoint().state | {f"other.{k}": torch.ones(1) for k in range(20)}
    with pytest.raises(CheckpointError, match=r"unknown key other\.0.*; and 12 more; "):
        from_state(state, 3)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("context_to_qk.weight", (20, 16)),
        ("context_to_v.weight", (24, 15)),
        ("to_out.weight", (24, 23)),
        ("to_out.bias", (23,)),
        ("norm.weight", (16,)),
        ("context_norm.bias", (24,)),
    ],
)
def test_dims_that_do_not_fit_together_are_named(name: str, shape: tuple[int, ...]) -> None:
    state = make_checkpoint(prenorm=True).state | {name: torch.ones(shape)}
    expected = rf"do not fit one layer of dim 24, context_dim 16: .*{re.escape(f'{name} {list(shape)}, needs')} \["
    with pytest.raises(CheckpointError, match=expected):
        from_state(state, 3)


@pytest.mark.parametrize("shape", [(24,), (24, 24, 1)], ids=str)
def test_a_projection_that_is_no_matrix_is_refused(shape: tuple[int, ...]) -> None:
    state = make_checkpoint().state | {"to_qk.weight": torch.ones(shape)}
    with pytest.raises(CheckpointError, match=rf"to_qk\.weight has shape {re.escape(str(list(shape)))}; a matrix is expected"):
        from_state(state, 3)


def test_a_gap_between_transformer_blocks_is_refused() -> None:
    state = {
        name: tensor for name, tensor in make_checkpoint(**TRANSFORMER | {"depth": 3}).state.items() if "layers.1." not in name
    }
    with pytest.raises(
        CheckpointError, match=r"blocks \[0, 2\] are not numbered from 0 without a gap; is the checkpoint complete"
    ):
        from_state(state, 3)


def test_a_transformer_without_its_first_block_is_not_sent_to_where_it_was_looked_for() -> None:
    state = {name: tensor for name, tensor in make_checkpoint(**TRANSFORMER).state.items() if not name.startswith("layers.0.")}
    with pytest.raises(CheckpointError) as caught:
        from_state(state, 3)
    # "no layer at the root; layers are at: ''; use --prefix" leads nowhere.
    assert "layers are at: ''" not in str(caught.value)


def test_every_place_that_the_prefix_error_names_can_be_loaded() -> None:
    wanted = make_checkpoint()
    state = prefixed("net.layers.2.0.", wanted.state) | prefixed("fusion.", wanted.state)
    with pytest.raises(CheckpointError, match="layers are at") as caught:
        from_state(state, 3)
    places = re.search(r"layers are at: (.*); use --prefix", str(caught.value))
    assert places
    for place in places[1].split(", "):
        assert_same(from_state(state, 3, place.strip("'")), wanted)


# A wrong prefix


@pytest.mark.parametrize(
    ("prefix", "said"),
    [
        ("", r"no layer at the root of the checkpoint; layers are at: 'decoder\.', 'encoder\.fusion\.'; use --prefix"),
        (
            "encoder.fuson.",
            r"no layer under prefix 'encoder\.fuson\.' \(did you mean 'encoder\.fusion\.'\?\); layers are at: 'dec",
        ),
        ("encoder", r"no layer under prefix 'encoder\.'.*layers are at: 'decoder\.', 'encoder\.fusion\.'; use --prefix"),
        ("head", r"no layer under prefix 'head\.'.*layers are at: 'decoder\.', 'encoder\.fusion\.'"),
    ],
)
def test_a_wrong_prefix_is_answered_with_the_places(prefix: str, said: str) -> None:
    state = inside_a_model(make_checkpoint().state, "encoder.fusion.") | prefixed(
        "decoder.", make_checkpoint(**TRANSFORMER).state
    )
    with pytest.raises(CheckpointError, match=said):
        from_state(state, 3, prefix)


def test_a_prefix_that_is_not_needed_is_answered_with_the_root() -> None:
    with pytest.raises(CheckpointError, match=r"no layer under prefix 'encoder\.'; layers are at: ''"):
        from_state(make_checkpoint().state, 3, "encoder.")


def test_a_checkpoint_of_another_model_is_refused_with_its_keys() -> None:
    state = nn.TransformerEncoderLayer(8, 2).state_dict()
    with pytest.raises(
        CheckpointError, match=r"no to_qk\.weight anywhere .* no bidirectional cross-attention; its keys are linear1"
    ):
        from_state(state, 2)


# Values


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_nan_and_inf_weights_are_named_and_counted(tmp_path: Path, value: float, suffix: str, dtype: torch.dtype) -> None:
    state = {name: tensor.clone().to(dtype) for name, tensor in make_checkpoint().state.items()}
    state["context_to_v.weight"][3, 4:6] = value
    path = save(state, tmp_path / f"model{suffix}")
    with pytest.raises(
        CheckpointError, match=r"^context_to_v\.weight holds 2 NaN or Inf of 384 values; .*before the divergence"
    ):
        load(path, heads=3)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64])
def test_weights_that_are_not_floating_point_are_refused(dtype: torch.dtype) -> None:
    state = make_checkpoint().state
    state["to_v.weight"] = state["to_v.weight"].to(dtype)
    with pytest.raises(CheckpointError, match=rf"to_v\.weight has dtype {dtype}; weights must be floating point"):
        from_state(state, 3)


# Files that are not checkpoints


@pytest.fixture(scope="module")
def good_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    directory, state = tmp_path_factory.mktemp("good"), make_checkpoint().state
    torch.save(state, directory / "old.pt", _use_new_zipfile_serialization=False)
    save(state, directory / "zip.pt")
    save(state, directory / "st.safetensors")
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("name", ["zip.pt", "st.safetensors", "old.pt"])
def test_a_file_truncated_anywhere_is_refused(tmp_path: Path, good_files: dict[str, bytes], name: str) -> None:
    path, whole = tmp_path / name, good_files[name]
    # All over the file, more densely where the headers are, and one byte short of whole.
    for cut in {*range(0, 2000, 97), *range(0, len(whole), 997), len(whole) - 1}:
        path.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError, match=rf"checkpoint .*{re.escape(name)} "):
            load(path, heads=3)


def test_a_truncated_file_is_called_so(tmp_path: Path, good_files: dict[str, bytes]) -> None:
    (tmp_path / "model.pt").write_bytes(good_files["zip.pt"][:-500])
    with pytest.raises(CheckpointError, match=r"model\.pt cannot be read \(.*\); it may be truncated: copy or save it again"):
        load(tmp_path / "model.pt", heads=3)
    (tmp_path / "model.safetensors").write_bytes(good_files["st.safetensors"][:-500])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a readable safetensors file: .*; save it again"):
        load(tmp_path / "model.safetensors", heads=3)


class Payload:
    """Makes a directory when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("suffix", [".pt", ".pth"])
def test_pickled_code_is_refused_and_not_run(tmp_path: Path, suffix: str, zipped: bool) -> None:
    target, path = tmp_path / "owned", tmp_path / f"model{suffix}"
    torch.save(make_checkpoint().state | {"extra": Payload(target)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        CheckpointError, match=r"holds pickled code .* never run from a checkpoint; save tensors only: torch\.save"
    ):
        load(path, heads=3)
    assert not target.exists()
    # The payload is live: unpickled by anything less careful it does its work.
    function, arguments = Payload(target).__reduce__()
    function(*arguments)
    assert target.exists()


def test_a_whole_pickled_module_is_refused_with_what_to_save(tmp_path: Path) -> None:
    torch.save(build(make_spec()), tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"holds pickled code .*torch\.save\(module\.state_dict\(\), path\)"):
        load(tmp_path / "model.pt", heads=3)


JUNK = {
    "empty": b"",
    "text": b"hello world\n",
    "yaml": b"epoch: 3\nlr: 0.1\n",
    "html": b"<!DOCTYPE html><html><body>404: Not found</body></html>",
    "lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
    "png": b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR",
    "zeros": bytes(64),
}


@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path, suffix: str, junk: str) -> None:
    path = tmp_path / f"notes{suffix}"
    path.write_bytes(JUNK[junk])
    with pytest.raises(CheckpointError, match=rf"checkpoint .*notes{re.escape(suffix)} "):
        load(path, heads=3)


@few
@given(content=st.binary(max_size=40))
def test_random_bytes_are_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "random.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"checkpoint .*random\.pt "):
        read(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([torch.ones(2)], r"holds a list, not a state dict of named tensors"),
        (torch.ones(2), r"holds a Tensor, not a state dict of named tensors"),
        (3, r"holds a int, not a state dict of named tensors"),
        ({}, r"holds no tensors; its keys are \[\]"),
        ({"epoch": 3, "lr": 0.1}, r"holds no tensors; its keys are \['epoch', 'lr'\]"),
        ({"state_dict": {"epoch": 3}}, r"holds no tensors; its keys are \['state_dict\.epoch'\]"),
    ],
    ids=["list", "tensor", "int", "empty", "no tensors", "wrapped nothing"],
)
def test_a_torch_file_without_a_state_dict_is_refused(tmp_path: Path, content: Any, said: str) -> None:
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=said):
        load(tmp_path / "model.pt", heads=3)


def test_a_safetensors_file_without_tensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no to_qk\.weight anywhere in the checkpoint"):
        load(save({}, tmp_path / "model.safetensors"), heads=3)


@pytest.mark.parametrize("name", ["model.h5", "model.onnx", "model"])
def test_an_unknown_suffix_is_refused_with_those_allowed(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    said = rf"suffix '{re.escape(Path(name).suffix)}' is not known; allowed are \.pt, \.pth, \.ckpt, \.bin, \.safetensors"
    with pytest.raises(CheckpointError, match=said):
        load(tmp_path / name, heads=3)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_missing_file_is_named(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(CheckpointError, match=rf"checkpoint .*gone{re.escape(suffix)} does not exist; give the path of a"):
        load(tmp_path / f"gone{suffix}", heads=3)
    (tmp_path / f"dir{suffix}").mkdir()
    with pytest.raises(CheckpointError):
        load(tmp_path / f"dir{suffix}", heads=3)


def test_checkpoint_errors_exit_with_2() -> None:
    assert CheckpointError.exit_code == InputError.exit_code == 2


# Live modules


@pytest.mark.parametrize("prenorm", [False, True])
@pytest.mark.parametrize("talking_heads", [False, True])
def test_live_seed_layer(prenorm: bool, talking_heads: bool) -> None:
    wanted = make_spec(prenorm=prenorm, talking_heads=talking_heads)
    module = build(wanted, dropout=0.3)
    found = from_module(module)
    assert found.spec == wanted
    assert_same(found, Checkpoint(wanted, dict(module.state_dict())))


@pytest.mark.parametrize("prenorm", [False, True])
@pytest.mark.parametrize("talking_heads", [False, True])
def test_live_layer_of_the_published_package(prenorm: bool, talking_heads: bool) -> None:
    module = published.BidirectionalCrossAttention(
        dim=24, context_dim=16, heads=3, dim_head=8, prenorm=prenorm, talking_heads=talking_heads
    )
    wanted = make_spec(prenorm=prenorm, talking_heads=talking_heads, norm="rms" if prenorm else "layer")
    assert_same(from_module(module), Checkpoint(wanted, dict(module.state_dict())))


@pytest.mark.parametrize(("context_dim", "final_norms"), [(16, False), (24, True)])
def test_live_transformer_of_the_published_package(context_dim: int, final_norms: bool) -> None:
    module = published.BidirectionalCrossAttentionTransformer(
        dim=24, context_dim=context_dim, depth=2, heads=3, dim_head=8, ff_expansion_factor=1.5, final_norms=final_norms
    )
    wanted = make_spec(
        context_dim=context_dim,
        prenorm=True,
        norm="rms",
        depth=2,
        ff_hidden=36,
        context_ff_hidden=int(1.5 * context_dim),
        final_norms=final_norms,
    )
    assert_same(from_module(module), Checkpoint(wanted, dict(module.state_dict())))


def test_a_published_transformer_that_cannot_run_is_refused_with_the_reason() -> None:
    module = published.BidirectionalCrossAttentionTransformer(dim=24, context_dim=16, depth=1, heads=3, final_norms=True)
    with pytest.raises(InputError, match=r"final_norms with context_dim 16 and dim 24: .*cannot run when the two differ"):
        from_module(module)


def test_eps_is_read_from_the_live_module() -> None:
    module: Any = build(make_spec(prenorm=True))
    module.norm.eps = module.context_norm.eps = 3e-3
    found = from_module(module)
    assert found.spec.norm_eps == 3e-3
    x, context = 0.01 * torch.randn(1, 4, 24), 0.01 * torch.randn(1, 3, 16)
    assert_same_results(found.module(torch.float32)(x, context), module(x, context))


def test_eps_of_a_live_rms_norm_is_read_and_none_is_pinned() -> None:
    module: Any = published.BidirectionalCrossAttention(dim=24, context_dim=16, heads=3, dim_head=8, prenorm=True)
    assert module.norm.eps is None
    for dtype in (torch.float64, torch.float32, torch.float16):
        assert from_module(module.to(dtype)).spec.norm_eps == 1.1920929e-07
    module.norm.eps = module.context_norm.eps = 1e-6
    assert from_module(module).spec.norm_eps == 1e-6


@pytest.mark.parametrize("pair", [(1e-5, 1e-6), (None, 1e-3)], ids=str)
def test_norms_with_different_eps_are_refused(pair: tuple[float | None, float]) -> None:
    module: Any = published.BidirectionalCrossAttention(dim=24, context_dim=16, heads=3, dim_head=8, prenorm=True)
    module.norm.eps, module.context_norm.eps = pair
    with pytest.raises(CheckpointError, match=r"different eps .*this layer has one for all"):
        from_module(module)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_an_eps_of_zero_is_kept_or_refused_but_not_replaced(norm: Any) -> None:
    module: Any = build(make_spec(prenorm=True, norm=norm))
    module.norm.eps = module.context_norm.eps = 0.0
    try:
        found = from_module(module).spec.norm_eps
    except (CheckpointError, InputError):
        return
    assert found == 0.0


def test_heads_are_read_from_the_live_module_unless_given() -> None:
    module = build(make_spec())
    assert from_module(module).spec.heads == 3
    assert from_module(module, heads=6).spec.heads == 6


def test_a_live_module_without_heads_needs_them() -> None:
    bare = nn.Module()
    for name, child in build(make_spec()).named_children():
        bare.add_module(name, child)
    with pytest.raises(InputError, match="heads cannot be read"):
        from_module(bare)
    assert from_module(bare, heads=3).spec == make_spec()


def test_a_wrapped_live_module_is_read() -> None:
    class Wrapper(nn.Module):
        def __init__(self, name: str, inner: nn.Module) -> None:
            super().__init__()
            self.add_module(name, inner)

    layer = build(make_spec(prenorm=True))
    wanted = from_module(layer)
    assert_same(from_module(Wrapper("module", Wrapper("_orig_mod", layer))), wanted)


def test_a_live_module_that_is_another_is_refused() -> None:
    with pytest.raises(CheckpointError, match="holds no bidirectional cross-attention; its keys are bias, weight"):
        from_module(nn.Linear(3, 3))


def test_a_live_module_keeps_its_dtype_and_its_training_mode() -> None:
    module = build(make_spec(prenorm=True)).double().train()
    found = from_module(module)
    assert {tensor.dtype for tensor in found.state.values()} == {torch.float64}
    assert module.training
    assert not any(tensor.requires_grad for tensor in found.state.values())


def test_training_on_does_not_change_the_checkpoint() -> None:
    module: Any = build(make_spec())
    found = from_module(module)
    before = found.state["to_v.weight"].clone()
    with torch.no_grad():
        module.to_v.weight.add_(1.0)
    assert torch.equal(found.state["to_v.weight"], before)


def test_tied_weights_can_be_written(tmp_path: Path) -> None:
    # LightGlue-like: one projection for both sides. safetensors refuses tensors that share memory.
    module: Any = build(make_spec(context_dim=24))
    module.context_to_qk.weight = module.to_qk.weight
    found = from_module(module)
    path = tmp_path / "tied.safetensors"
    save_file(found.state, path)
    assert_same(load(path, heads=3), found)


def test_transposed_weights_are_made_contiguous(tmp_path: Path) -> None:
    state = make_checkpoint().state
    turned = state | {"to_v.weight": state["to_v.weight"].t().contiguous().t()}
    found = from_state(turned, 3)
    assert all(tensor.is_contiguous() for tensor in found.state.values())
    assert_same(found, Checkpoint(make_spec(), state))


def test_keys_come_in_one_order_whatever_the_order_in_the_file() -> None:
    state = make_checkpoint(prenorm=True).state
    backwards = dict(reversed(state.items()))
    assert list(from_state(backwards, 3).state) == list(from_state(state, 3).state)


def test_a_checkpoint_that_the_system_does_not_show_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"checkpoint .*x{300}\.pt cannot be read: File name too long"):
        load(tmp_path / f"{'x' * 300}.pt")


# ---- weights that are none

ODD: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "meta": (lambda v: v.to("meta"), r"is on the meta device, which holds no values; load the weights into the module first"),
    "coo": (lambda v: v.to_sparse(), r"is not dense \(torch\.sparse_coo\); give a plain tensor"),
    "csr": (lambda v: v.to_sparse_csr(), r"is not dense \(torch\.sparse_csr\)"),
    "nested": (lambda v: torch.nested.nested_tensor([v, v]), r"is not dense \(nested\)"),
    "float8": (lambda v: v.to(torch.float8_e5m2), r"has dtype torch\.float8_e5m2; weights must be floating point \(float32, "),
    "complex": (lambda v: torch.complex(v, v).conj(), r"has dtype torch\.complex64; weights must be floating point"),
    "quantized": (lambda v: torch.quantize_per_tensor(v, 0.1, 0, torch.qint8), r"has dtype torch\.qint8; weights must be"),
    "lazy": (lambda v: nn.LazyLinear(3).weight, "has no shape yet; run the module once"),
    "no tensor": (lambda v: {"scale": 1.0}, "is a dict; weights must be tensors"),
}


@pytest.mark.filterwarnings("ignore")  # torch's own, of what is made here
@pytest.mark.parametrize("kind", list(ODD))
def test_a_tensor_that_holds_no_plain_weights_is_named(kind: str) -> None:
    odd, message = ODD[kind]
    state = dict(make_checkpoint(prenorm=True).state)
    with pytest.raises(CheckpointError, match=rf"^to_v\.weight {message}"):
        from_state(state | {"to_v.weight": odd(state["to_v.weight"])}, 3)


def test_a_tensor_of_a_class_that_refuses_to_be_looked_at_is_named() -> None:
    class Shy(Tensor):
        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.isfinite:
                raise NotImplementedError
            return super().__torch_function__(function, types, args, kwargs or {})

    state = dict(make_checkpoint(prenorm=True).state)
    message = r"^to_v\.weight, a Shy, gives no values \(NotImplementedError\(\)\); give plain tensors$"
    with pytest.raises(CheckpointError, match=message):
        from_state(state | {"to_v.weight": state["to_v.weight"].as_subclass(Shy)}, 3)


@pytest.mark.parametrize("view", [torch._neg_view, lambda v: torch.complex(v, -v).conj().imag])
def test_weights_that_are_negated_by_a_bit_are_what_they_say(tmp_path: Path, view: Callable[[Tensor], Tensor]) -> None:
    state = dict(make_checkpoint(prenorm=True).state)
    weight = view(state["to_v.weight"])
    assert weight.is_neg()
    found = from_state(state | {"to_v.weight": weight}, 3).state
    save_file(found, tmp_path / "again.safetensors")
    assert torch.equal(read(tmp_path / "again.safetensors")["to_v.weight"], weight.clone())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_making_the_module_neither_moves_the_random_numbers_on_nor_shares_its_weights(dtype: torch.dtype) -> None:
    checkpoint, before = make_checkpoint(prenorm=True), torch.get_rng_state()
    module = checkpoint.module(dtype)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.no_grad():
        module.to_v.weight.zero_()
    assert checkpoint.state["to_v.weight"].any()
    assert all(parameter.requires_grad and parameter.dtype == dtype for parameter in module.parameters())


NO_MODULES: dict[str, tuple[Any, str]] = {
    "state dict": (dict(nn.Linear(2, 2).state_dict()), "this is a dict; load the state dict into the module, or save it"),
    "path": ("x.pt", r"this is a str; for a checkpoint run bca-export --checkpoint x\.pt"),
    "Path": (Path("x.pt"), r"; for a checkpoint run bca-export --checkpoint x\.pt"),
    "class": (nn.Linear, "give a trained module, not the class Linear"),
    "nothing": (None, "this is a NoneType; give the trained module itself"),
    "function": (len, "give the trained module itself"),
}


@pytest.mark.parametrize("kind", list(NO_MODULES))
def test_what_is_no_module_is_refused_with_the_way_out(kind: str) -> None:
    given, message = NO_MODULES[kind]
    with pytest.raises(InputError, match=message):
        from_module(given)
