"""Recipes: what the defaults are, what overrides what, and that a mistake is named with its remedy."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bca_deploy.errors import InputError
from bca_deploy.exporter.plan import load_checkpoint
from bca_deploy.exporter.recipe import Recipe, read_recipe
from bca_deploy.layers.lowered_model import choose
from bca_deploy.signature import DimRange, Dims
from bca_deploy.spec import LAYER_DIMS, Interface, LayerSpec
from bca_deploy.tracing.graph import check_opset

Reader = Callable[..., Recipe]

COMMITTED = sorted((Path(__file__).resolve().parents[2] / "export" / "recipes").glob("*.toml"))


@pytest.fixture
def recipe_of(tmp_path: Path) -> Reader:
    """Return a function from TOML text to the recipe read from a file of it."""

    def read(text: str, overrides: dict[str, Any] | None = None) -> Recipe:
        path = tmp_path / "recipe.toml"
        path.write_text(text, encoding="utf-8")
        return read_recipe(path, overrides)

    return read


def test_defaults_are_the_documented_export() -> None:
    recipe = read_recipe(None)
    assert recipe.layer.spec() == LayerSpec(dim=512, context_dim=386, heads=8, dim_head=64, prenorm=True, norm="layer")
    assert recipe.interface == Interface(mask=True, context_mask=True, rel_pos_bias="none", attention_maps=False)
    assert recipe.ranges == Dims(batch=DimRange(1, 4, 8), x_len=DimRange(1, 512, 2048), context_len=DimRange(1, 512, 2048))
    assert (recipe.opset, recipe.lowering, recipe.precision, recipe.parity) == (17, "auto", ("fp32",), "quick")
    assert (recipe.keep_io_types, recipe.external_data_bytes, recipe.seed) == (True, 2_000_000_000, 0)


def test_an_empty_file_is_the_defaults(recipe_of: Reader) -> None:
    assert recipe_of("") == Recipe()


def test_the_default_weights_are_seeded_and_leave_the_callers_random_state_alone() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again = load_checkpoint(Recipe(), None, None), load_checkpoint(Recipe(), None, None)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first.state[name], again.state[name]) for name in first.state)
    other = load_checkpoint(Recipe(seed=1), None, None)
    assert not torch.equal(first.state["to_qk.weight"], other.state["to_qk.weight"])


def test_every_key_of_a_file_is_read(recipe_of: Reader) -> None:
    recipe = recipe_of("""
        description = "all of it"
        opset = 20
        lowering = "reference"
        precision = ["fp32", "bf16"]
        keep_io_types = false
        parity = "full"
        external_data_bytes = 1000
        seed = 3
        [layer]
        dim = 24
        context_dim = 16
        heads = 3
        dim_head = 8
        prenorm = false
        talking_heads = true
        [inputs]
        mask = false
        context_mask = false
        rel_pos_bias = "batch"
        [outputs]
        attention_maps = true
        [dims]
        batch = { min = 1, opt = 1, max = 2 }
        x_len = { min = 2, opt = 3, max = 4 }
        context_len = { min = 5, opt = 5, max = 5 }
    """)
    assert recipe.layer.spec() == LayerSpec(dim=24, context_dim=16, heads=3, dim_head=8, talking_heads=True)
    assert recipe.interface == Interface(False, False, "batch", True)
    assert recipe.ranges == Dims(batch=DimRange(1, 1, 2), x_len=DimRange(2, 3, 4), context_len=DimRange(5, 5, 5))
    assert recipe.model_dump(include={"opset", "lowering", "precision", "keep_io_types", "parity", "external_data_bytes"}) == {
        "opset": 20,
        "lowering": "reference",
        "precision": ("fp32", "bf16"),
        "keep_io_types": False,
        "parity": "full",
        "external_data_bytes": 1000,
    }
    assert (recipe.description, recipe.seed) == ("all of it", 3)


def test_flags_override_the_file_key_by_key(recipe_of: Reader) -> None:
    text = 'opset = 18\nprecision = "fp16"\n[inputs]\nmask = false\n[dims]\nbatch = { min = 1, opt = 2, max = 3 }'
    flags = {"opset": 20, "inputs": {"context_mask": False}, "dims": {"batch": {"min": 4, "opt": 4, "max": 4}}}
    recipe = recipe_of(text, flags)
    assert recipe.opset == 20
    assert recipe.precision == ("fp16",)
    assert recipe.interface == Interface(mask=False, context_mask=False)
    assert recipe.ranges["batch"] == DimRange(4, 4, 4)
    assert recipe.ranges["x_len"] == LAYER_DIMS["x_len"]


@pytest.mark.parametrize("given", [(1, 4, 8), [1, 4, 8], {"min": 1, "opt": 4, "max": 8}])
def test_a_range_is_three_sizes_and_overrides_one_of_the_file(recipe_of: Reader, given: Any) -> None:
    for text in ("", "[dims]\nx_len = [2, 5, 9]", "[dims]\nx_len = { min = 2, opt = 5, max = 9 }"):
        assert recipe_of(text, {"dims": {"x_len": given}}).ranges["x_len"] == DimRange(1, 4, 8)
    assert recipe_of("[dims]\nx_len = [2, 5, 9]", {"dims": {"batch": given}}).ranges["x_len"] == DimRange(2, 5, 9)


def test_a_flag_that_was_not_given_overrides_nothing(recipe_of: Reader) -> None:
    flags = {"opset": None, "inputs": {"mask": None, "rel_pos_bias": None}, "dims": {"batch": None}}
    assert recipe_of("opset = 18\n[inputs]\nmask = false", flags) == recipe_of("opset = 18\n[inputs]\nmask = false")


def test_a_flag_of_false_is_given(recipe_of: Reader) -> None:
    recipe = recipe_of("keep_io_types = true\n[inputs]\nmask = true", {"keep_io_types": False, "inputs": {"mask": False}})
    assert not recipe.keep_io_types
    assert not recipe.interface.mask


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("opest = 18", r"unknown key opest \(did you mean 'opset'\?\)"),
        ("[layers]\ndim = 3", r"unknown key layers \(did you mean 'layer'\?\)"),
        ("[layer]\nhead = 3", r"unknown key layer\.head \(did you mean 'heads'\?\)"),
        ("[inputs]\nmasks = true", r"unknown key inputs\.masks \(did you mean 'mask'\?\)"),
        ("[outputs]\nattention_map = true", r"unknown key outputs\.attention_map \(did you mean 'attention_maps'\?\)"),
        ("[dims]\nbatches = { min = 1, opt = 1, max = 1 }", r"unknown key dims\.batches \(did you mean 'batch'\?\)"),
        ("[dims]\nbatch = { min = 1, opt = 1, max = 1, maxx = 2 }", r"unknown key dims\.batch\.maxx \(did you mean 'max'\?\)"),
        ("[dims]\nx_len = { mim = 1, opt = 1, max = 1 }", r"unknown key dims\.x_len\.mim \(did you mean 'min'\?\)"),
    ],
)
def test_an_unknown_key_names_its_place_and_the_nearest(recipe_of: Reader, text: str, message: str) -> None:
    with pytest.raises(InputError, match=rf"recipe\.toml: .*{message}"):
        recipe_of(text)


def test_a_key_like_no_other_suggests_nothing(recipe_of: Reader) -> None:
    with pytest.raises(InputError, match=r"unknown key zzz$"):
        recipe_of("zzz = 1")


def test_an_unknown_option_of_the_python_api_is_named_too() -> None:
    with pytest.raises(InputError, match=r"options: unknown key opest \(did you mean 'opset'\?\)"):
        read_recipe(None, {"opest": 18})


def test_every_mistake_is_named_at_once(recipe_of: Reader) -> None:
    with pytest.raises(InputError, match=r"layer\.dim: .*; .*opset: .*") as caught:
        recipe_of('opset = "new"\n[layer]\ndim = "wide"')
    assert "got 'wide'" in str(caught.value)
    assert "got 'new'" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "batch = { min = 5, opt = 4, max = 8 }",
            r"dims\.batch: dimension range min 5, opt 4, max 8: needs 1 <= min <= opt <= max",
        ),
        ("batch = { min = 1, opt = 9, max = 8 }", r"min 1, opt 9, max 8: needs"),
        ("x_len = { min = 0, opt = 1, max = 8 }", r"dims\.x_len: dimension range min 0, opt 1, max 8: needs 1 <= min"),
        ("context_len = { min = 0, opt = 0, max = 0 }", r"dims\.context_len: .*min 0, opt 0, max 0: needs 1 <= min"),
        ("x_len = { min = -4, opt = 1, max = 8 }", r"min -4, opt 1, max 8"),
        ("x_len = { min = 1, opt = 1 }", r"dims\.x_len\.max is missing, and dims\.x_len cannot be without it"),
        ("x_len = 5", r"dims\.x_len: give three sizes, min, opt and max, such as \(1, 4, 8\) \(got 5\)"),
        ("x_len = [1, 8]", r"dims\.x_len: give three sizes, min, opt and max, such as \(1, 4, 8\) \(got \[1, 8\]\)"),
        ("x_len = [1, 9, 8]", r"dims\.x_len: dimension range min 1, opt 9, max 8: needs"),
        ("x_len = { min = 1, opt = 1.5, max = 2 }", r"dims\.x_len\.opt: .*got 1\.5"),
    ],
)
def test_a_range_that_is_none_is_refused(recipe_of: Reader, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        recipe_of(f"[dims]\n{text}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('opset = "seventeen"', r"opset: .*integer.*got 'seventeen'"),
        ("opset = 17.5", r"opset: .*integer.*got 17\.5"),
        ("opset = [17]", r"opset: .*integer.*got \[17\]"),
        ('lowering = "fusd"', r"lowering.*'auto'.*'reference' or 'fused'.*got 'fusd'"),
        ('parity = "none"', r"parity: .*'quick' or 'full'.*got 'none'"),
        ("external_data_bytes = -1", r"external_data_bytes: .*greater than or equal to 0.*got -1"),
        ('[inputs]\nrel_pos_bias = "share"', r"inputs\.rel_pos_bias: .*'none', 'plane', 'shared' or 'batch'.*got 'share'"),
        ('[layer]\nnorm = "batch"', r"layer\.norm: .*'layer' or 'rms'.*got 'batch'"),
        ('[inputs]\nmask = "perhaps"', r"inputs\.mask: .*boolean.*got 'perhaps'"),
    ],
)
def test_a_value_of_the_wrong_kind_says_what_is_allowed_and_what_it_got(recipe_of: Reader, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        recipe_of(text)


def test_precision_is_a_word_or_a_list(recipe_of: Reader) -> None:
    assert recipe_of('precision = "bf16"').precision == ("bf16",)
    assert recipe_of('precision = ["fp16", "fp32"]').precision == ("fp16", "fp32")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('"fp8"', r"precision\.0: .*'fp32', 'fp16' or 'bf16'.*got 'fp8'"),
        ('["fp32", "half"]', r"precision\.1: .*\(did you mean 'fp16'\?\) \(got 'half'\)"),
        ('"float16"', r"precision\.0: .*\(did you mean 'fp16'\?\) \(got 'float16'\)"),
        ('"bfloat16"', r"precision\.0: .*\(did you mean 'bf16'\?\) \(got 'bfloat16'\)"),
        ('"float32"', r"precision\.0: .*\(did you mean 'fp32'\?\) \(got 'float32'\)"),
        ("[]", r"precision: .*at least 1"),
        ("16", r"precision: .*got 16"),
    ],
)
def test_an_unknown_precision_is_refused(recipe_of: Reader, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        recipe_of(f"precision = {text}")


@pytest.mark.parametrize(
    ("text", "key"),
    [("outputs = true", "outputs"), ("inputs = 3", "inputs"), ('dims = "wide"', "dims"), ("[[inputs]]\nmask = true", "inputs")],
)
def test_a_value_where_a_table_belongs_is_refused_under_flags_too(recipe_of: Reader, text: str, key: str) -> None:
    # The command line lays its flags, given or not, over every table.
    flags: dict[str, Any] = {name: {} for name in ("inputs", "outputs", "dims")}
    with pytest.raises(InputError, match=rf"recipe\.toml: {key}: "):
        recipe_of(text, flags)


@pytest.mark.parametrize("content", [b"opset = = 17", b"[layer\ndim = 3", b"{}", b"opset = 17\nopset = 18", b"\xff\xfe\x00"])
def test_a_file_that_is_not_toml_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.toml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"recipe .*broken\.toml is not TOML: "):
        read_recipe(path)


def test_a_missing_file_names_the_nearest_beside_it(tmp_path: Path) -> None:
    (tmp_path / "masked.toml").write_text("", encoding="utf-8")
    with pytest.raises(InputError, match=r"maskd\.toml does not exist \(did you mean 'masked\.toml'\?\).*export/recipes"):
        read_recipe(tmp_path / "maskd.toml")
    with pytest.raises(InputError, match=r"recipe .*r\.toml does not exist; recipes are TOML"):
        read_recipe(tmp_path / "nowhere" / "r.toml")


def test_a_directory_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read_recipe(tmp_path)


@pytest.mark.parametrize(
    ("expansion", "hidden", "context_hidden"), [("4.0", 40, 28), ("4", 40, 28), ("2.55", 25, 17), ("0.5", 5, 3)]
)
def test_depth_gives_feed_forwards_of_the_truncated_width(
    recipe_of: Reader, expansion: str, hidden: int, context_hidden: int
) -> None:
    layer = f'dim = 10\ncontext_dim = 7\nheads = 2\nnorm = "rms"\ndepth = 2\nff_expansion = {expansion}'
    spec = recipe_of(f"[layer]\n{layer}").layer.spec()
    assert (spec.depth, spec.ff_hidden, spec.context_ff_hidden) == (2, hidden, context_hidden)


def test_a_bare_layer_has_no_feed_forward() -> None:
    spec = Recipe().layer.spec()
    assert (spec.depth, spec.ff_hidden, spec.context_ff_hidden) == (None, None, None)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("heads = 0", r"layer\.heads is 0; it must be at least 1"),
        ("dim = -3", r"layer\.dim is -3; it must be at least 1"),
        ('depth = 0\nnorm = "rms"', r"layer\.depth is 0"),
        ("depth = 1", r"always has RMSNorm .* layer\.norm = 'rms'"),
        ("final_norms = true", r"belong to the transformer; set layer\.depth"),
        ('depth = 1\nnorm = "rms"\nfinal_norms = true', r"context_dim 386 and dim 512.*cannot run"),
        ('depth = 1\nnorm = "rms"\nff_expansion = 0.001', r"layer\.ff_hidden is 0"),
        ('depth = 1\nnorm = "rms"\nff_expansion = inf', r"ff_expansion"),
        ('depth = 1\nnorm = "rms"\nff_expansion = nan', r"ff_expansion"),
    ],
)
def test_a_layer_that_cannot_be_is_refused(recipe_of: Reader, layer: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        recipe_of(f"[layer]\n{layer}").layer.spec()


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_a_committed_recipe_reads_and_can_be_lowered(path: Path) -> None:
    recipe = read_recipe(path)
    assert len(recipe.description) > 20
    check_opset(recipe.opset)
    assert choose(recipe.lowering, recipe.layer.spec(), recipe.interface) in ("reference", "fused")


def test_a_recipe_that_the_system_does_not_show_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"recipe .*x{300}\.toml cannot be read: File name too long"):
        read_recipe(tmp_path / f"{'x' * 300}.toml")
