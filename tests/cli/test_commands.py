"""The command line: what it refuses and how it says so, what it prints, its exit codes, and that it leaves nothing behind."""

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx.external_data_helper import set_external_data
from safetensors.torch import save_file
from support.bundles import plain_verdict
from support.layers import make_checkpoint, make_spec
from support.processes import HEAVY, run_without
from support.servers import PATIENCE_S
from typer.testing import CliRunner, Result

from bca_deploy.bundle.read import Bundle, sha256
from bca_deploy.bundle.write import staged
from bca_deploy.cli import app, console, export_app
from bca_deploy.exporter import layer_source, models, pipeline
from bca_deploy.exporter import verify as verification
from bca_deploy.exporter.layer_source import LayerSource
from bca_deploy.parity import user_sample
from bca_deploy.spec import LAYER_DIMS, Interface

CPU = "fp32.onnxruntime-cpu"
BIN = Path(sys.executable).parent


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default output is relative to where the command runs."""
    monkeypatch.chdir(tmp_path)


def bca(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def bca_export(*arguments: object) -> Result:
    return CliRunner().invoke(export_app, [str(argument) for argument in arguments])


def ended(result: Result, code: int) -> None:
    """Hold the exit code, and that it was chosen: a crash exits 1 as well."""
    shown = (result.output, result.exception)
    assert result.exit_code == code, shown
    assert result.exception is None or isinstance(result.exception, SystemExit), shown


def refused(result: Result, message: str, code: int = 2) -> None:
    """Hold that the command ended with one readable message on standard error and nothing on standard output."""
    ended(result, code)
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    last = result.stderr[result.stderr.index("error: ") :]
    assert re.search(message, last), last


def contents(directory: Path) -> dict[str, bytes | None]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() if p.is_file() else None for p in sorted(directory.rglob("*"))}


@contextmanager
def nothing_written(directory: Path) -> Iterator[None]:
    before = contents(directory)
    yield
    assert contents(directory) == before


class Code:
    """What a malicious checkpoint holds: something that runs when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, ...]]:
        return os.system, ("touch was-run",)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints and samples, good and bad. ``layer`` is the layer of the fixture ``exported``."""
    place = tmp_path_factory.mktemp("samples")
    checkpoint = make_checkpoint(prenorm=True)
    state = checkpoint.state
    save_file(state, place / "layer.safetensors")
    save_file(make_checkpoint(1, prenorm=True).state, place / "retrained.safetensors")
    save_file(make_checkpoint(talking_heads=True).state, place / "talking.safetensors")
    save_file({"encoder.fusion." + name: tensor for name, tensor in state.items()}, place / "inside.safetensors")
    save_file({"conv.weight": torch.ones(3)}, place / "other.safetensors")
    broken = dict(state, **{"to_v.weight": state["to_v.weight"].clone()})
    broken["to_v.weight"][3, 5] = torch.nan
    save_file(broken, place / "nan.safetensors")
    torch.save(state, place / "layer.pt")
    torch.save([1, 2], place / "list.pt")
    torch.save({"model": Code(), **state}, place / "code.pt")
    (place / "text.pt").write_text("not a checkpoint")
    (place / "layer.h5").write_bytes((place / "layer.pt").read_bytes())
    for name in ("layer.safetensors", "layer.pt"):
        whole = (place / name).read_bytes()
        (place / f"cut-{name}").write_bytes(whole[: len(whole) // 2])
    right = user_sample.from_module(checkpoint.module(torch.float32), checkpoint.spec, Interface(), LAYER_DIMS)
    maps = user_sample.from_module(
        checkpoint.module(torch.float32), checkpoint.spec, Interface(attention_maps=True), LAYER_DIMS
    )
    for name, arrays in {
        "right": right,
        "wrong": right | {"context_out": right["context_out"] + 0.01},
        "halved": {name: array for name, array in right.items() if name not in ("out", "context_out")},
        "typo": right | {"contxt_mask": right["context_mask"]},
        "whole-mask": right | {"mask": right["mask"].astype(np.float32)},
        "biased": right | {"rel_pos_bias": np.zeros((7, 5), np.float32)},
        "one-map": {name: array for name, array in maps.items() if name != "context_attn"},
    }.items():
        np.savez(place / f"{name}.npz", **arrays)  # type: ignore[arg-type]
    whole = (place / "right.npz").read_bytes()
    (place / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (place / "empty.npz").write_bytes(b"")
    (place / "text.npz").write_text("not arrays")
    np.save(place / "one.npy", right["x"])
    return place


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is refused must be refused before the slow part."""

    def work(*args: object) -> None:
        raise AssertionError("the work began")

    monkeypatch.setattr(pipeline, "run", work)


@pytest.fixture
def traced(exported: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing takes 5 s and tests of its own: here every trace gives the graph of ``exported``, whatever the layer."""
    monkeypatch.setattr(layer_source, "trace", lambda *args: ir.load(exported.path("models/fp32.onnx")))


@pytest.fixture
def judged(traced: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither is parity what most tests here are about."""
    monkeypatch.setattr(layer_source, "judge", lambda *args, **kwargs: plain_verdict())


@pytest.fixture
def layer(samples: Path) -> tuple[str, ...]:
    return "--checkpoint", str(samples / "layer.safetensors"), "--heads", "3"


@pytest.fixture
def copy(exported: Bundle, tmp_path: Path) -> Path:
    """A bundle to damage."""
    return Path(shutil.copytree(exported.directory, tmp_path / "copy"))


# ---- help


@pytest.mark.parametrize(
    ("run", "arguments", "texts"),
    [
        (bca, ["--help"], ["export", "verify", "inspect"]),
        (bca, ["export", "-h"], ["--checkpoint", "--heads", "Exit codes: 0 done, 1 parity failed, 2 bad input, 130"]),
        (bca_export, ["--help"], ["--checkpoint", "--heads", "Exit codes: 0 done, 1 parity failed, 2 bad input, 130"]),
        (bca, ["verify", "--help"], ["--inputs", "Exit codes: 0 passed, 1 parity failed, 2 bad input"]),
        (bca, ["inspect", "--help"], ["--json", "neither torch nor onnx"]),
    ],
)
def test_help_says_what_the_command_does(run: Callable[..., Result], arguments: list[str], texts: list[str]) -> None:
    result = run(*arguments)
    ended(result, 0)
    shown = " ".join(result.stdout.split())
    assert all(text in shown for text in texts), result.stdout


@pytest.mark.parametrize("run", [lambda *args: bca("export", *args), bca_export], ids=["bca export", "bca-export"])
def test_help_shows_what_stands_in_brackets(run: Callable[..., Result]) -> None:
    # Defaults and shapes: rich takes them for markup and drops them.
    shown = " ".join(run("--help").stdout.split())
    for text in ("[default: 17]", "[default: fp32]", "[default: build/model]", "[i,j], [heads,i,j] or [batch,heads,i,j]"):
        assert text in shown, text


def test_help_imports_nothing_heavy() -> None:
    script = """
from bca_deploy.cli import app, export_app
for run, arguments in ((app, []), (export_app, []), (app, ["export"]), (app, ["verify"]), (app, ["inspect"])):
    try:
        run([*arguments, "--help"])
    except SystemExit as exit:
        assert not exit.code
    loaded = {"torch", "onnx", "numpy", "rich"} | ({"pydantic"} if run is app and not arguments else set())
    print(arguments, sorted(loaded & set(sys.modules)), file=sys.stderr)
"""
    # typer itself takes pydantic for the page of a command with options; the first page must do without.
    done = run_without((), script)
    assert done.returncode == 0
    assert done.stderr.splitlines() == ["[] []", "[] []", "['export'] []", "['verify'] []", "['inspect'] []"]


# ---- bad input to export

BAD_INPUT = {
    "truncated safetensors": (
        "--checkpoint {samples}/cut-layer.safetensors --heads 3",
        r"cut-layer\.safetensors is not a readable safetensors file: .*; save it again",
    ),
    "truncated pt": ("--checkpoint {samples}/cut-layer.pt --heads 3", r"cannot be read .*it may be truncated: copy or save it"),
    "pickled code": ("--checkpoint {samples}/code.pt --heads 3", "code is never run from a checkpoint; save tensors only"),
    "text": ("--checkpoint {samples}/text.pt --heads 3", r"cannot be read \(it is no file of torch\.save\)"),
    "a list": ("--checkpoint {samples}/list.pt --heads 3", "holds a list, not a state dict of named tensors"),
    "another model": (
        "--checkpoint {samples}/other.safetensors --heads 3",
        r"no to_qk\.weight anywhere in the checkpoint, so it holds no .*its keys are conv\.weight",
    ),
    "another suffix": (
        "--checkpoint {samples}/layer.h5 --heads 3",
        r"suffix '\.h5' is not known; allowed are \.pt, \.pth, \.ckpt",
    ),
    "no file": ("--checkpoint nowhere.pt --heads 3", r"nowhere\.pt does not exist or is not a file; check the path"),
    "wrong prefix": (
        "--checkpoint {samples}/inside.safetensors --heads 3 --prefix encoder.fusio.",
        r"no layer under prefix 'encoder\.fusio\.' \(did you mean 'encoder\.fusion\.'\?\); layers are at: 'encoder\.fusion\.'",
    ),
    "no prefix": (
        "--checkpoint {samples}/inside.safetensors --heads 3",
        r"no layer at the root of the checkpoint; layers are at: 'encoder\.fusion\.'; use --prefix",
    ),
    "heads that do not divide": (
        "--checkpoint {samples}/layer.safetensors --heads 5",
        "heads 5 does not divide the inner width 24; allowed: 1, 2, 3, 4, 6, 8, 12, 24",
    ),
    "no heads": (
        "--checkpoint {samples}/layer.safetensors",
        "heads cannot be read from this checkpoint .*give --heads, one of the divisors of the inner width 24: 1, 2, 3, 4, 6",
    ),
    "heads 0": ("--checkpoint {samples}/layer.safetensors --heads 0", "heads 0"),
    "heads 0 without a checkpoint": ("--heads 0", "layer.heads is 0; it must be at least 1"),
    "heads -3": ("--checkpoint {samples}/layer.safetensors --heads -3", "heads -3 does not divide"),
    "other heads than the talking ones": (
        "--checkpoint {samples}/talking.safetensors --heads 4",
        "heads 4, but the talking-heads weights are for 3; leave --heads out or give 3",
    ),
    "NaN weights": (
        "--checkpoint {samples}/nan.safetensors --heads 3",
        r"to_v\.weight holds 1 NaN or Inf of 576 values; take a checkpoint from before",
    ),
    "opset 16": ("--opset 16", r"opset 16 cannot be exported; allowed: 17 to 27"),
    "opset 99": ("--opset 99", r"opset 99 cannot be exported; allowed: 17 to 27"),
    "min over opt": ("--batch 8:4:16", r"dims\.batch: dimension range min 8, opt 4, max 16: needs 1 <= min <= opt <= max"),
    "opt over max": ("--x-len 1:9:8", r"dims\.x_len: dimension range min 1, opt 9, max 8: needs"),
    "length 0": ("--context-len 0:1:8", r"dims\.context_len: dimension range min 0, opt 1, max 8: needs 1 <= min"),
    "only length 0": ("--x-len 0", r"dims\.x_len: dimension range min 0, opt 0, max 0: needs 1 <= min"),
    "half a range": ("--x-len 1:8", r"dimension range '1:8': give MIN:OPT:MAX such as 1:512:2048, or one number"),
    "words for a range": ("--x-len all", "dimension range 'all': give MIN:OPT:MAX"),
    "other digits for a range": ("--x-len 1:²:3", "dimension range '1:²:3': give MIN:OPT:MAX"),
    "unknown recipe key": ("--recipe {samples}/../recipe.toml", r"recipe\.toml: unknown key opest \(did you mean 'opset'\?\)"),
    "no recipe": ("--recipe nowhere.toml", r"recipe nowhere\.toml does not exist; recipes are TOML files"),
    "unknown precision": ("--precision fp32 --precision fp8", r"precision\.1: .*'fp32', 'fp16' or 'bf16'.*got 'fp8'"),
    "negative threshold": ("--external-data-bytes -1", "external_data_bytes: .*greater than or equal to 0"),
    "fused attention maps": (
        "--lowering fused --attention-maps",
        "lowering 'fused' is impossible with attention maps as outputs.*; use lowering 'reference' or 'auto'",
    ),
    "fused talking heads": (
        "--checkpoint {samples}/talking.safetensors --lowering fused",
        "lowering 'fused' is impossible with talking heads",
    ),
    "two places": ("--out here --archive there.bca", "--out and --archive are two places for one bundle; give one of them"),
    "archive of another suffix": ("--archive model.zip", r"--archive model\.zip: the name must end in \.bca"),
    "sample that is missing": ("--expect nowhere.npz", r"nowhere\.npz does not exist or is not a file"),
    "sample without outputs": (
        "--checkpoint {samples}/layer.safetensors --heads 3 --expect {samples}/halved.npz",
        r"halved\.npz: out, context_out missing; save x, context, out",
    ),
    "sample with a misspelt name": (
        "--checkpoint {samples}/layer.safetensors --heads 3 --expect {samples}/typo.npz",
        r"typo\.npz: unknown array 'contxt_mask' \(did you mean 'context_mask'\?\)",
    ),
    "sample with a mask of floats": (
        "--checkpoint {samples}/layer.safetensors --heads 3 --expect {samples}/whole-mask.npz",
        "mask has dtype float32; allowed: bool",
    ),
    "sample with a bias the export lacks": (
        "--checkpoint {samples}/layer.safetensors --heads 3 --expect {samples}/biased.npz",
        "the sample has rel_pos_bias, but the export has no such input",
    ),
    "sample that is text": (
        "--checkpoint {samples}/layer.safetensors --heads 3 --expect {samples}/text.npz",
        r"text\.npz is not a readable \.npz or \.npy of plain arrays",
    ),
    "sample that is truncated": (
        "--checkpoint {samples}/layer.safetensors --heads 3 --expect {samples}/cut.npz",
        r"cut\.npz is not a readable \.npz or \.npy of plain arrays",
    ),
    "sample that is empty": (
        "--checkpoint {samples}/layer.safetensors --heads 3 --expect {samples}/empty.npz",
        r"empty\.npz is not a readable \.npz or \.npy of plain arrays",
    ),
    "sample that is one array": (
        "--checkpoint {samples}/layer.safetensors --heads 3 --expect {samples}/one.npy",
        r"one\.npy holds one array without a name",
    ),
}


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_refused_and_nothing_is_written(samples: Path, tmp_path: Path, case: str) -> None:
    arguments, message = BAD_INPUT[case]
    (samples.parent / "recipe.toml").write_text("opest = 18")
    with nothing_written(tmp_path):
        refused(bca_export(*arguments.format(samples=samples).split()), message)


@pytest.mark.usefixtures("no_work")
def test_bca_export_is_also_a_command_of_bca(tmp_path: Path) -> None:
    with nothing_written(tmp_path):
        refused(bca("export", "--opset", "16"), "opset 16 cannot be exported")


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("arguments", [["--opset", "new"], ["--parity", "none"], ["--frobnicate"], ["--lowering", "best"]])
def test_bad_usage_exits_2(tmp_path: Path, arguments: list[str]) -> None:
    with nothing_written(tmp_path):
        result = bca_export(*arguments)
    ended(result, 2)
    assert arguments[0] in result.stderr


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("table", ["inputs = true", "outputs = []", 'dims = "wide"', "[layer]\nff_expansion = inf\ndepth = 1"])
def test_a_recipe_of_nonsense_is_refused(tmp_path: Path, table: str) -> None:
    (tmp_path / "recipe.toml").write_text(table)
    with nothing_written(tmp_path):
        refused(bca_export("--recipe", "recipe.toml"), r"recipe\.toml: |ff_expansion")


@pytest.mark.usefixtures("no_work")
def test_a_recipe_of_another_layer_is_refused(tmp_path: Path, layer: tuple[str, ...]) -> None:
    (tmp_path / "recipe.toml").write_text("[layer]\ndim = 48")
    with nothing_written(tmp_path):
        refused(bca_export("--recipe", "recipe.toml", *layer), "layer.dim is 48 in the recipe and 24 in the checkpoint")


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("force", [(), ("--force",)])
def test_a_directory_that_is_no_bundle_is_never_touched(tmp_path: Path, force: tuple[str, ...]) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years of work")
    with nothing_written(tmp_path):
        refused(
            bca_export("--out", "thesis", *force), "thesis exists and is not a bundle; it is never touched, with --force either"
        )


@pytest.mark.usefixtures("no_work")
def test_an_existing_bundle_needs_force(tmp_path: Path, copy: Path) -> None:
    for more in ((), ("--dry-run",)):
        with nothing_written(tmp_path):
            refused(bca_export("--out", copy, *more), "copy already holds a bundle; use --force to replace it")


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("sample", "heads", "message"),
    [
        ("wrong", "3", r"the sample's context_out is not what this layer computes: largest difference 0\.01, allowed"),
        # The mistake that parity cannot see: both sides would have the wrong heads.
        ("right", "4", r"the sample's out is not what this layer computes: .*check --heads"),
    ],
)
def test_a_sample_of_another_function_exits_1(samples: Path, tmp_path: Path, sample: str, heads: str, message: str) -> None:
    with nothing_written(tmp_path):
        result = bca_export(
            "--checkpoint", samples / "layer.safetensors", "--heads", heads, "--expect", samples / f"{sample}.npz"
        )
        refused(result, message, code=1)


@pytest.mark.usefixtures("no_work")
def test_a_sample_with_one_attention_map_of_two_is_checked_or_refused(samples: Path, layer: tuple[str, ...]) -> None:
    result = bca_export(*layer, "--attention-maps", "--expect", samples / "one-map.npz", "--dry-run")
    if result.exit_code:
        refused(result, "context_attn")
    else:
        ended(result, 0)


# ---- the plan


@pytest.mark.usefixtures("no_work")
def test_a_dry_run_shows_the_plan_and_writes_nothing(samples: Path, tmp_path: Path, layer: tuple[str, ...]) -> None:
    with nothing_written(tmp_path):
        result = bca_export(
            *layer, "--expect", samples / "right.npz", "--opset", "20", "--no-mask", "--dry-run", "--out", "a/b"
        )
    # The sample has a mask that this export would not take: refused in a dry run as in earnest.
    refused(result, "the sample has mask, but the export has no such input")
    with nothing_written(tmp_path):
        result = bca_export(*layer, "--expect", samples / "right.npz", "--opset", "20", "--dry-run", "--out", "a/b")
    ended(result, 0)
    for text in ("dim 24, context_dim 16, 3 heads of 8, LayerNorm first", "fused", "20", "mask [batch, x_len]", "a/b"):
        assert text in result.stdout
    assert "dry run: nothing was written" in result.stdout


@pytest.mark.usefixtures("no_work")
def test_a_dry_run_in_json(tmp_path: Path, layer: tuple[str, ...]) -> None:
    flags = (
        "--precision",
        "fp16",
        "--precision",
        "bf16",
        "--x-len",
        "1:8:64",
        "--batch",
        "4",
        "--no-context-mask",
        "--half-io",
    )
    with nothing_written(tmp_path):
        result = bca_export(*layer, *flags, "--rel-pos-bias", "shared", "--attention-maps", "--dry-run", "--json")
    ended(result, 0)
    assert result.stderr == ""
    plan = json.loads(result.stdout)
    assert plan["layer"]["heads"] == 3
    assert plan["weights"].endswith("layer.safetensors")
    assert (plan["lowering"], plan["opset"], plan["precision"]) == ("reference", 17, ["fp16", "bf16"])
    assert plan["keep_io_types"] is False
    assert plan["inputs"] == {
        "x": ["batch", "x_len", 24],
        "context": ["batch", "context_len", 16],
        "mask": ["batch", "x_len"],
        "rel_pos_bias": [3, "x_len", "context_len"],
    }
    assert list(plan["outputs"]) == ["out", "context_out", "attn", "context_attn"]
    assert plan["dims"]["x_len"] == {"min": 1, "opt": 8, "max": 64}
    assert plan["dims"]["batch"] == {"min": 4, "opt": 4, "max": 4}
    assert plan["out"] == "build/model"


@pytest.mark.usefixtures("no_work")
def test_the_default_plan_is_the_documented_one() -> None:
    plan = json.loads(bca_export("--dry-run", "--json").stdout)
    assert plan["weights"] == "seeded (0)"
    assert (plan["layer"]["dim"], plan["layer"]["context_dim"], plan["layer"]["heads"]) == (512, 386, 8)
    assert (plan["opset"], plan["lowering"], plan["precision"]) == (17, "fused", ["fp32"])


# ---- exporting


@pytest.mark.usefixtures("traced")
def test_an_export_prints_the_parity_table_and_leaves_a_bundle(tmp_path: Path, layer: tuple[str, ...]) -> None:
    result = bca_export(*layer)
    ended(result, 0)
    assert "parity, fp32: error against float64, beside PyTorch" in result.stdout
    assert re.search(
        r"fp32: parity passed, \d\d cases \(quick\), worst RMS ratio to PyTorch [\d.]+ \(limit [\d.]+\)", result.stdout
    )
    assert "bundle: build/model" in result.stdout
    assert [line for line in result.stderr.splitlines() if line] == [
        f"{stage} ..." for stage in ("weights", "trace fp32", "parity fp32", f"trace {CPU}", f"parity {CPU}", "self-test")
    ]
    assert Bundle.open(tmp_path / "build/model").manifest.models[0].parity.passed


@pytest.mark.usefixtures("traced")
def test_an_export_in_json_prints_nothing_else(layer: tuple[str, ...]) -> None:
    result = bca_export(*layer, "--archive", "model.bca", "--json")
    ended(result, 0)
    printed = json.loads(result.stdout)
    assert (printed["bundle"], printed["passed"]) == ("model.bca", True)
    model, for_cpu = printed["models"]
    assert (model["model"], for_cpu["model"]) == ("fp32", CPU)
    assert model["precision"] == for_cpu["precision"] == "fp32"
    assert model["cases"] >= 40
    assert model["failures"] == []
    assert {group["family"] for group in model["groups"]} >= {"no mask", "padded", "dead rows"}
    with Bundle.open("model.bca") as bundle:
        assert bundle.manifest.models[0].parity.cases == model["cases"]


@pytest.mark.usefixtures("judged")
def test_force_replaces_a_bundle_and_keeps_the_users_files(copy: Path, layer: tuple[str, ...]) -> None:
    (copy / "notes.txt").write_text("mine")
    ended(bca_export(*layer, "--out", copy, "--force"), 0)
    assert [model.file for model in Bundle.open(copy).manifest.models] == ["models/fp32.onnx", f"models/{CPU}.onnx"]
    assert not (copy / "models/fp16.onnx").exists()
    assert (copy / "notes.txt").read_text() == "mine"


@pytest.mark.usefixtures("traced")
def test_failed_parity_exits_1_and_leaves_no_bundle(samples: Path, tmp_path: Path) -> None:
    # The graph holds the weights from before the layer was trained again: no stage but parity can notice.
    (tmp_path / "build").mkdir()
    with nothing_written(tmp_path):
        result = bca_export("--checkpoint", samples / "retrained.safetensors", "--heads", "3")
        refused(result, r"the exported model is not the PyTorch model \(\d+ failures\):\n  .*largest error .*, allowed", code=1)


@pytest.mark.usefixtures("judged")
def test_failed_parity_leaves_the_old_bundle(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, copy: Path, layer: tuple[str, ...]
) -> None:
    monkeypatch.setattr(layer_source, "judge", lambda *args, **kwargs: plain_verdict(("it is wrong",)))
    with nothing_written(tmp_path):
        refused(bca_export(*layer, "--out", copy, "--force"), "it is wrong", code=1)


@pytest.mark.usefixtures("judged")
def test_keep_failed_leaves_what_failed_to_look_at(monkeypatch: pytest.MonkeyPatch, samples: Path, tmp_path: Path) -> None:
    monkeypatch.setattr(layer_source, "judge", lambda *args, **kwargs: plain_verdict(("it is wrong",)))
    for _ in range(2):  # the second time in place of the first
        result = bca_export("--checkpoint", samples / "retrained.safetensors", "--heads", "3", "--keep-failed", "--out", "m")
        ended(result, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["m.failed"]
    assert [model.parity.passed for model in Bundle.open("m.failed").manifest.models] == [False, False]
    report = json.loads((tmp_path / "m.failed/parity.json").read_text())
    assert report["models"][0]["failures"]
    result = bca("inspect", "m.failed")
    ended(result, 0)
    assert re.search(r"FAILED, \d+ cases \(quick\)", result.stdout)
    # The graph is of the weights before these, whatever the verdict above says of it.
    refused(bca("verify", "m.failed", "--parity", "quick"), "self-test fp32/.* is off by", code=1)


def test_what_failed_without_bound_can_be_looked_at(
    judged: None, monkeypatch: pytest.MonkeyPatch, layer: tuple[str, ...]
) -> None:
    # Where PyTorch makes no error at all, the ratio to it is infinite.
    monkeypatch.setattr(layer_source, "judge", lambda *args, **kwargs: plain_verdict(("it is wrong",), float("inf")))
    refused(bca_export(*layer, "--keep-failed", "--out", "m"), r"\(2 failures\):\n  it is wrong", code=1)
    assert Bundle.open("m.failed").manifest.models[0].parity.passed is False


def test_keep_failed_does_not_touch_another_directory_and_still_exits_1(
    judged: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, layer: tuple[str, ...]
) -> None:
    monkeypatch.setattr(layer_source, "judge", lambda *args, **kwargs: plain_verdict(("it is wrong",)))
    (tmp_path / "m.failed").mkdir()
    (tmp_path / "m.failed" / "notes.txt").write_text("mine")
    with nothing_written(tmp_path):
        result = bca_export(*layer, "--keep-failed", "--out", "m")
    refused(result, "it is wrong", code=1)


@pytest.mark.usefixtures("judged")
@pytest.mark.parametrize("out", [("--out", "copy"), ("--archive", "model.bca")])
def test_a_full_disk_leaves_what_was_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, copy: Path, layer: tuple[str, ...], out: tuple[str, str]
) -> None:
    def full(model: object, path: Path, *args: object) -> None:
        path.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(layer_source, "write", full)
    with nothing_written(tmp_path):
        refused(bca_export(*layer, *out, "--force"), r"No space left on device: .*fp32\.onnx")


# ---- interruption


def interrupt(*args: object, **kwargs: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.usefixtures("judged")
@pytest.mark.parametrize(
    "stage", [(LayerSource, "write_files"), (layer_source, "trace"), (layer_source, "judge"), (models, "finish")]
)
@pytest.mark.parametrize("out", [("--out", "new"), ("--out", "copy", "--force"), ("--archive", "new.bca")])
def test_an_interrupt_exits_130_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    copy: Path,
    layer: tuple[str, ...],
    stage: tuple[Any, str],
    out: tuple[str, ...],
) -> None:
    monkeypatch.setattr(*stage, interrupt)
    with nothing_written(tmp_path):
        refused(bca_export(*layer, *out), "^error: interrupted; nothing was left behind$", code=130)


@pytest.mark.usefixtures("judged")
def test_an_interrupt_leaves_not_even_the_directories_around(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, layer: tuple[str, ...]
) -> None:
    monkeypatch.setattr(layer_source, "judge", interrupt)
    with nothing_written(tmp_path):
        refused(bca_export(*layer), "nothing was left behind", code=130)


def test_an_interrupted_verify_exits_130(monkeypatch: pytest.MonkeyPatch, exported: Bundle) -> None:
    monkeypatch.setattr(verification, "judge", interrupt)
    refused(bca("verify", exported.directory), "interrupted", code=130)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "word"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
def test_a_signal_in_a_real_export_ends_it_and_leaves_nothing(
    tmp_path: Path, layer: tuple[str, ...], number: signal.Signals, word: str
) -> None:
    command = [BIN / "bca-export", *layer, "--out", "model"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        seen = [process.stderr.readline() for _ in range(2)]
        assert any(tmp_path.iterdir())  # it is in the middle of it, or the test shows nothing
        process.send_signal(number)
        out, err = process.communicate(timeout=PATIENCE_S)
    assert contents(tmp_path) == {}
    assert seen == ["weights ...\n", "trace fp32 ...\n"]
    assert (process.returncode, out) == (128 + number, "")
    assert err.splitlines()[-1] == f"error: {word}; nothing was left behind"  # after stages that were quicker than we are


def test_control_c_that_a_destructor_swallows_ends_the_work_at_the_next_stage() -> None:
    class Swallows:
        def __del__(self) -> None:
            with contextlib.suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), console.progress() as progress:  # noqa: PT012  (the second stage is the point)
        progress.stage("trace")
        Swallows()
        progress.stage("parity")
    assert signal.getsignal(signal.SIGINT) is before


# ---- absent packages


@pytest.mark.usefixtures("traced")
def test_without_onnxruntime_the_error_holds_the_pip_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, layer: tuple[str, ...], exported: Bundle
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    message = r"onnxruntime is not installed; run: pip install 'bca-deploy\[cpu\]'"
    with nothing_written(tmp_path):
        refused(bca_export(*layer, "--out", "model"), message)
        refused(bca("verify", exported.directory), message)


def test_an_absent_onnxruntime_is_found_before_the_work(
    monkeypatch: pytest.MonkeyPatch, no_work: None, layer: tuple[str, ...]
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    refused(bca_export(*layer), r"pip install 'bca-deploy\[cpu\]'")


def test_without_the_export_packages_the_error_holds_the_pip_command(exported: Bundle, tmp_path: Path) -> None:
    script = """
from bca_deploy.cli import app
for arguments in (["export"], ["verify", sys.argv[1]]):
    try:
        app(arguments)
    except SystemExit as exit:
        print(exit.code)
"""
    with nothing_written(tmp_path):
        done = run_without(HEAVY, script, exported.directory)
    assert done.stdout == "2\n2\n"
    assert done.stderr.splitlines() == [
        "error: torch is not installed; run: pip install 'bca-deploy[export]'",
        "error: onnx is not installed; run: pip install 'bca-deploy[export]'",
    ]


# ---- verify


def own_inputs(**changes: Any) -> dict[str, Any]:
    """Inputs as a user has them, of sizes that no other case has; a change of None takes one away."""
    rng = np.random.default_rng(3)
    spec = make_spec()
    arrays: dict[str, Any] = {
        "x": rng.standard_normal((2, 9, spec.dim)).astype(np.float32),
        "context": rng.standard_normal((2, 4, spec.context_dim)).astype(np.float32),
        "mask": np.arange(9) < np.array([[9], [6]]),
    }
    return {name: array for name, array in (arrays | changes).items() if array is not None}


def test_verify_passes_a_bundle(exported: Bundle) -> None:
    result = bca("verify", exported.directory, "--parity", "quick")
    ended(result, 0)
    for precision in ("fp32", "fp16"):
        assert re.search(rf"{precision}: parity passed, \d\d cases \(quick\)", result.stdout)
    assert "own inputs" in result.stdout  # the sample that the export stored


def test_verify_holds_an_archive_to_ones_own_inputs_in_json(exported: Bundle, tmp_path: Path) -> None:
    with staged(tmp_path / "model.bca") as directory:
        shutil.copytree(exported.directory, directory, dirs_exist_ok=True)
    np.savez(tmp_path / "own.npz", **own_inputs())
    np.savez(tmp_path / "more.npz", **own_inputs(mask=None, x=np.ones((2, 1, 24), np.float64)))
    result = bca("verify", "model.bca", "--parity", "quick", "--inputs", "own.npz", "--inputs", "more.npz", "--json")
    ended(result, 0)
    printed = json.loads(result.stdout)
    assert printed["passed"] is True
    assert [model["model"] for model in printed["models"]] == ["fp32", "fp16", CPU]
    for model in printed["models"]:
        own = [group for group in model["groups"] if group["family"] == "own inputs" and group["runtime"] == "onnxruntime"]
        assert [group["cases"] for group in own] == [3]  # these two, and the sample that the export stored


def change_model(bundle: Path, change: Callable[[onnx.ModelProto], object]) -> None:
    """Change fp32.onnx, and the manifest so that only the change can be found."""
    path = bundle / "models/fp32.onnx"
    model = onnx.load(path, load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())
    fix_hash(bundle, "models/fp32.onnx")


def fix_hash(bundle: Path, name: str) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": (bundle / name).stat().st_size, "sha256": sha256(bundle / name)}
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def weight(model: onnx.ModelProto, name: str = "to_v.weight") -> onnx.TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def spoil(model: onnx.ModelProto) -> None:
    tensor = weight(model)
    tensor.raw_data = (np.frombuffer(tensor.raw_data, np.float32) * np.float32(1.001)).tobytes()


def test_verify_fails_a_model_that_computes_something_else(copy: Path) -> None:
    change_model(copy, spoil)
    refused(bca("verify", copy, "--parity", "quick"), r"self-test fp32/dead-rows: \w+ is off by", code=1)


def test_failed_parity_is_printed_and_exits_1(monkeypatch: pytest.MonkeyPatch, copy: Path) -> None:
    # As if the self-test were too weak: the matrix finds it as well.
    monkeypatch.setattr(verification, "_run_selftest", lambda *args: None)
    change_model(copy, spoil)
    result = bca("verify", copy, "--parity", "quick")
    ended(result, 1)
    assert re.search(r"fp32: parity FAILED, .*\n", result.stdout)
    assert re.search(r"failed: .*largest error", result.stdout)
    assert re.search(r"fp16: parity passed", result.stdout)


def test_failed_parity_in_json_exits_1_too(monkeypatch: pytest.MonkeyPatch, exported: Bundle) -> None:
    verdicts = iter([plain_verdict(), plain_verdict(("it is wrong",), float("inf")), plain_verdict()])
    monkeypatch.setattr(verification, "judge", lambda *args, **kwargs: next(verdicts))
    result = bca("verify", exported.directory, "--json")
    ended(result, 1)
    printed = json.loads(result.stdout, parse_constant=pytest.fail)  # Infinity and NaN are no JSON
    assert printed["passed"] is False
    assert [model["passed"] for model in printed["models"]] == [True, False, True]
    assert printed["models"][1]["failures"] == ["it is wrong"]


def test_a_stored_sample_that_no_longer_fits_exits_1(copy: Path, samples: Path) -> None:
    shutil.copy(samples / "wrong.npz", copy / "expect.npz")
    fix_hash(copy, "expect.npz")
    refused(bca("verify", copy), "the sample's context_out is not what this layer computes", code=1)


@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_a_changed_byte_is_refused_and_the_file_named(copy: Path, command: str) -> None:
    content = bytearray((copy / "models/fp16.onnx").read_bytes())
    content[1000] ^= 1
    (copy / "models/fp16.onnx").write_bytes(content)
    refused(bca(command, copy), r"^error: models/fp16\.onnx has changed since the export")


@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_a_path_that_is_no_bundle_is_refused(tmp_path: Path, command: str) -> None:
    refused(bca(command, "nowhere"), r"nowhere is not a bundle: it has no manifest\.json")
    (tmp_path / "text.bca").write_text("text")
    refused(bca(command, "text.bca"), r"text\.bca is neither a bundle directory nor a readable \.bca archive")


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("../outside.bin", "unsafe path"),
        ("../../outside.bin", "unsafe path"),
        ("{tmp_path}/outside.bin", "unsafe path"),
        ("..\\outside.bin", "unsafe path"),
        ("link.bin", "unsafe path 'link.bin': it is a link that leads out"),
        ("unlisted.bin", r"fp32\.onnx keeps weight to_v\.weight in unlisted\.bin, which the manifest does not list"),
        ("./unlisted.bin", "which the manifest does not list"),
        ("nowhere.bin", "which the manifest does not list"),
    ],
)
def test_weights_outside_the_bundle_are_refused(copy: Path, tmp_path: Path, location: str, message: str) -> None:
    # The right bytes in the wrong place: everything but the place is as it should be.
    def move(model: onnx.ModelProto) -> None:
        tensor = weight(model)
        for place in (tmp_path, copy, copy / "models"):
            name = "unlisted.bin" if place == copy / "models" else "outside.bin"
            (place / name).write_bytes(tensor.raw_data)
        set_external_data(tensor, location.format(tmp_path=tmp_path))
        tensor.ClearField("raw_data")

    (copy / "models/link.bin").symlink_to(tmp_path / "outside.bin")
    change_model(copy, move)
    refused(bca("verify", copy, "--parity", "quick"), message)


@pytest.mark.parametrize(
    ("location", "message"),
    [("../../outside.bin", "unsafe path"), ("unlisted.bin", "which the manifest does not list")],
)
def test_a_constant_outside_the_bundle_is_refused(copy: Path, tmp_path: Path, location: str, message: str) -> None:
    # Not only initializers may keep their data in a file: so may the tensor in a Constant node, and runtimes read it.
    def move(model: onnx.ModelProto) -> None:
        tensor = weight(model)
        for path in (tmp_path / "outside.bin", copy / "models/unlisted.bin"):
            path.write_bytes(tensor.raw_data)
        set_external_data(tensor, location)
        tensor.ClearField("raw_data")
        model.graph.node.insert(0, onnx.helper.make_node("Constant", [], [tensor.name], value=tensor))
        model.graph.initializer.remove(tensor)

    change_model(copy, move)
    refused(bca("verify", copy, "--parity", "quick"), message)


def test_external_weights_without_a_place_are_refused(copy: Path) -> None:
    def lose(model: onnx.ModelProto) -> None:
        weight(model).data_location = onnx.TensorProto.EXTERNAL

    change_model(copy, lose)
    refused(bca("verify", copy, "--parity", "quick"), r"to_v\.weight")


def test_external_weights_that_the_manifest_lists_are_read(monkeypatch: pytest.MonkeyPatch, copy: Path) -> None:
    monkeypatch.setattr(verification, "judge", lambda *args, **kwargs: plain_verdict())  # the self-test shows it

    def move(model: onnx.ModelProto) -> None:
        tensor = weight(model)
        (copy / "models/fp32.onnx.data").write_bytes(tensor.raw_data)
        set_external_data(tensor, "fp32.onnx.data")
        tensor.ClearField("raw_data")

    change_model(copy, move)
    fix_hash(copy, "models/fp32.onnx.data")
    ended(bca("verify", copy, "--parity", "quick"), 0)


@pytest.mark.parametrize("content", [b"", b"no protobuf"])
def test_a_model_that_is_none_is_refused(copy: Path, content: bytes) -> None:
    (copy / "models/fp32.onnx").write_bytes(content)
    fix_hash(copy, "models/fp32.onnx")
    refused(bca("verify", copy, "--parity", "quick"), r"fp32\.onnx")


def test_a_manifest_that_names_a_model_it_does_not_list_is_refused(copy: Path) -> None:
    manifest = (copy / "manifest.json").read_text().replace('"file": "models/fp32.onnx"', '"file": "models/other.onnx"')
    (copy / "manifest.json").write_text(manifest)
    refused(bca("verify", copy, "--parity", "quick"), r"the bundle has no models/other\.onnx; it has .*models/fp32\.onnx")


BAD_INPUTS: dict[str, tuple[dict[str, Any], str]] = {
    "no x": ({"x": None}, r"bad\.npz: x missing|x is missing"),
    "no context": ({"context": None}, r"bad\.npz: context missing|context is missing"),
    "misspelt": ({"maks": np.ones((2, 9), bool), "mask": None}, r"unknown array 'maks' \(did you mean 'mask'\?\)"),
    "bias": ({"rel_pos_bias": np.zeros((9, 4), np.float32)}, "has rel_pos_bias, but the export has no such input"),
    "narrow": ({"x": np.ones((2, 9, 23), np.float32)}, r"x has shape \(2, 9, 23\), needs \[batch, length, 24\]"),
    "flat": ({"context": np.ones((4, 16), np.float32)}, r"context has shape \(4, 16\), needs \[batch, length, 16\]"),
    "mask of floats": ({"mask": np.ones((2, 9), np.float32)}, "mask has dtype float32; allowed: bool"),
    "mask of other bytes": (
        {"mask": np.full((2, 9), 255, np.uint8).view(bool)},
        "mask holds a byte that is neither 0 nor 1; save it as",
    ),
    "whole numbers": ({"x": np.ones((2, 9, 24), np.int64)}, "x has dtype int64; allowed: float16, float32, float64"),
    "objects": ({"x": np.array([None, 1])}, r"bad\.npz is not a readable \.npz or \.npy of plain arrays"),
    "other batch": ({"context": np.ones((3, 4, 16), np.float32)}, "inputs do not fit together"),
    "other length": ({"mask": np.ones((2, 8), bool)}, "inputs do not fit together"),
    "no position": ({"x": np.ones((2, 0, 24), np.float32), "mask": None}, r"\(2, 0, 24\)"),
    "no batch": ({"x": np.ones((0, 9, 24), np.float32), "mask": None}, r"\(0, 9, 24\)|do not fit together"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_inputs_that_do_not_fit_are_refused(exported: Bundle, tmp_path: Path, case: str) -> None:
    changes, message = BAD_INPUTS[case]
    np.savez(tmp_path / "bad.npz", **own_inputs(**changes))
    refused(bca("verify", exported.directory, "--parity", "quick", "--inputs", "bad.npz"), message)


def test_own_inputs_of_nan_never_pass(monkeypatch: pytest.MonkeyPatch, exported: Bundle, tmp_path: Path) -> None:
    monkeypatch.setattr(verification, "judge", lambda *args, **kwargs: plain_verdict())
    np.savez(tmp_path / "bad.npz", **own_inputs(x=np.full((2, 9, 24), np.nan, np.float32)))
    result = bca("verify", exported.directory, "--parity", "quick", "--inputs", "bad.npz")
    ended(result, result.exit_code)
    assert result.exit_code in (1, 2)
    assert "NaN" in result.output


def test_own_inputs_that_fail_fail_the_bundle(monkeypatch: pytest.MonkeyPatch, copy: Path, tmp_path: Path) -> None:
    # As if these inputs alone brought the defect to light.
    monkeypatch.setattr(verification, "judge", lambda *args, **kwargs: plain_verdict())
    monkeypatch.setattr(verification, "_run_selftest", lambda *args: None)
    change_model(copy, spoil)
    np.savez(tmp_path / "own.npz", **own_inputs())
    result = bca("verify", copy, "--parity", "quick", "--inputs", "own.npz")
    ended(result, 1)
    assert re.search(r"fp32: parity FAILED", result.stdout)
    assert re.search(r"failed: own\.npz under onnxruntime: context_out, \w+ rows: largest error", result.stdout)


def test_outputs_among_own_inputs_are_held_against_the_layer(
    monkeypatch: pytest.MonkeyPatch, exported: Bundle, samples: Path
) -> None:
    monkeypatch.setattr(verification, "judge", lambda *args, **kwargs: plain_verdict())
    ended(bca("verify", exported.directory, "--parity", "quick", "--inputs", samples / "right.npz"), 0)
    result = bca("verify", exported.directory, "--parity", "quick", "--inputs", samples / "wrong.npz")
    refused(result, "the sample's context_out is not what this layer computes", code=1)


@pytest.mark.parametrize("name", ["nowhere.npz", "text.npz", "cut.npz", "empty.npz", "one.npy"])
def test_inputs_that_cannot_be_read_are_refused(exported: Bundle, samples: Path, name: str) -> None:
    result = bca("verify", exported.directory, "--inputs", samples / name)
    refused(result, rf"{re.escape(name)} (is not a readable|holds one array|does not exist)")


# ---- inspect


def test_inspect_shows_the_layer_the_models_the_tensors_and_the_files(exported: Bundle) -> None:
    result = bca("inspect", exported.directory)
    ended(result, 0)
    assert result.stderr == ""
    shown = " ".join(result.stdout.split())
    for text in (
        "bundle format 1, every hash right",
        "dim 24, context_dim 16, 3 heads of 8, LayerNorm first",
        "batch 1..8 (opt 4), x_len 1..2048 (opt 512)",
        "models/fp32.onnx 17 fp32 fused",
        "mask bool [batch, x_len]",
        "context_out float32 [batch, context_len, 16]",
        f"weights.safetensors {exported.manifest.files['weights.safetensors'].bytes}",
    ):
        assert text in shown, text


def test_inspect_in_json_is_the_manifest(exported: Bundle) -> None:
    result = bca("inspect", exported.directory, "--json")
    ended(result, 0)
    assert result.stderr == ""
    assert json.loads(result.stdout) == json.loads((exported.directory / "manifest.json").read_text())


# ---- odd weights: one sentence and exit code 2, for 1 says that parity failed

ODD: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "float8": (lambda v: v.to(torch.float8_e4m3fn), r"has dtype torch\.float8_e4m3fn; weights must be floating point"),
    "sparse": (lambda v: v.to_sparse(), r"is not dense \(torch\.sparse_coo\)"),
    "meta": (lambda v: v.to("meta"), "is on the meta device, which holds no values"),
    "integers": (lambda v: v.to(torch.int8), r"has dtype torch\.int8; weights must be floating point"),
}


@pytest.mark.parametrize("kind", list(ODD))
def test_odd_weights_are_refused_in_one_sentence(tmp_path: Path, kind: str) -> None:
    odd, message = ODD[kind]
    state = make_checkpoint(prenorm=True).state
    torch.save(state | {"to_qk.weight": odd(state["to_qk.weight"])}, tmp_path / "odd.pt")
    refused(bca_export("--checkpoint", tmp_path / "odd.pt", "--heads", 3, "--dry-run"), rf"^error: to_qk\.weight {message}")
