"""`bca bench`: every contender computes the same layer, each in a process of its own, and what cannot run says why."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.layers import make_checkpoint
from typer.testing import CliRunner

import bca_deploy
from bca_deploy.benchmarking import suite
from bca_deploy.benchmarking.contenders import NAMES, QUICK, Name, contender, obstacle, prepare
from bca_deploy.benchmarking.grid import Asked, make_grid, parse_shapes
from bca_deploy.benchmarking.result import Result
from bca_deploy.benchmarking.setting import Place, Setting, feeds_of
from bca_deploy.benchmarking.torch_forms import sdpa_form
from bca_deploy.bundle.manifest import LayerEntry
from bca_deploy.bundle.read import Bundle
from bca_deploy.cli import app
from bca_deploy.errors import BcaError, InputError
from bca_deploy.progress import Silent
from bca_deploy.spec import LayerSpec
from bca_deploy.timing.inputs import padded_inputs
from bca_deploy.whole.factory import make

SIZES = {"batch": 4, "x_len": 9, "context_len": 8}


def first_two(found: Any) -> list[np.ndarray]:
    values = list(found.values()) if hasattr(found, "values") else list(found)
    return [np.asarray(value) for value in values[:2]]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name == "compiled" else ()) for name in NAMES if name != "session"],
)
def test_every_contender_computes_the_layer_dead_rows_too(exported: Bundle, tmp_path: Path, name: Name) -> None:
    setting, feeds = Setting(exported, tmp_path, "fp32", 1), feeds_of(exported, SIZES)
    assert not feeds["mask"].all()  # there are dead rows
    prepare(name, setting)
    run = contender(name, setting, feeds)
    with bca_deploy.open(exported.directory, threads=1) as session:
        for ours, theirs in zip(session(**feeds), first_two(run()), strict=True):
            np.testing.assert_allclose(theirs, ours, atol=3e-6)


@pytest.mark.parametrize("name", ["eager", "sdpa", "plain", "literal", "portable"])
def test_in_half_precision_too(exported: Bundle, tmp_path: Path, name: Name) -> None:
    setting, feeds = Setting(exported, tmp_path, "fp16", 1), feeds_of(exported, SIZES)
    prepare(name, setting)
    with bca_deploy.open(exported.directory, threads=1) as session:
        for ours, theirs in zip(session(**feeds), first_two(contender(name, setting, feeds)()), strict=True):
            np.testing.assert_allclose(theirs.astype(np.float32), ours, atol=2e-2)


@pytest.mark.parametrize("bias", ["none", "plane", "batch"])
def test_pytorchs_fused_attention_is_made_right(bias: str) -> None:
    layer = make_checkpoint(prenorm=True).module(torch.float32)
    torch.manual_seed(1)
    x, context = torch.randn(3, 6, 24), torch.randn(3, 4, 16)
    masks = {"mask": torch.rand(3, 6) < 0.6, "context_mask": torch.rand(3, 4) < 0.6}
    masks["context_mask"][0] = False
    shapes = {"plane": (6, 4), "batch": (3, 3, 6, 4)}
    given = masks if bias == "none" else masks | {"rel_pos_bias": torch.randn(shapes[bias])}
    with torch.no_grad():
        for options in (given, {n: t for n, t in given.items() if n != "mask"}):
            for ours, theirs in zip(sdpa_form(layer)(x, context, **options), layer(x, context, **options)[:2], strict=True):
                torch.testing.assert_close(ours, theirs, atol=3e-6, rtol=1e-5)


def test_a_transformer_has_no_fused_contender() -> None:
    with pytest.raises(InputError, match="takes the place of a bare layer's, not of a transformer's"):
        sdpa_form(torch.nn.Identity())


def test_what_cannot_run_says_why(exported: Bundle) -> None:
    manifest = exported.manifest
    assert [name for name in NAMES if obstacle(name, manifest, lambda package: True)] == []
    absent = {name: obstacle(name, manifest, lambda package: False) for name in NAMES}
    assert absent["eager"] == absent["literal"] == "torch is not installed"
    assert absent["openvino"] == "openvino is not installed"
    assert absent["session"] is absent["portable"] is None
    assert "no bfloat16" in (obstacle("portable", manifest, lambda package: True, "bf16") or "")
    assert obstacle("eager", manifest, lambda package: True, "bf16") is None
    spec = LayerSpec(dim=8, context_dim=8, heads=2, talking_heads=True)
    mixed = manifest.model_copy(update={"layers": (LayerEntry(path="", spec=spec, lowering="reference"),)})
    assert "without talking heads" in (obstacle("sdpa", mixed, lambda package: True) or "")


def test_a_grid_is_measured_one_process_each(exported: Bundle) -> None:
    command = ["bench", str(exported.directory), "--shape", "1x3x4", "--shape", "2x3x4", "--contender", "eager"]
    result = CliRunner().invoke(app, [*command, "--seconds", "0.05", "--threads", "1", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert [(m["contender"], m["shape"]) for m in report["measurements"]] == [
        ("eager", [1, 3, 4]),
        ("session", [1, 3, 4]),
        ("eager", [2, 3, 4]),
        ("session", [2, 3, 4]),
    ]
    for m in report["measurements"]:
        assert m["runs"] >= 7
        assert 0 < m["min_ms"] <= m["p50_ms"] <= m["p90_ms"] <= m["p99_ms"]
        assert m["pairs_per_s"] > 0
        assert m["threads"] == 1
        assert m["ratio"]["rounds"] == 7
        assert m["call_mb"] >= 0
    eager, session = (m["peak_rss_mb"] for m in report["measurements"][:2])
    assert session < eager / 2  # no torch in the session's process
    assert report["machine"]["cores"] >= 1
    assert "numpy" in report["machine"]["versions"]
    assert report["dims"] == ["batch", "x_len", "context_len"]
    Result.model_validate(report)
    assert report["backend"].startswith("onnxruntime-cpu: ")


def test_the_table_sets_everything_beside_the_session(exported: Bundle) -> None:
    command = ["bench", str(exported.directory), "--shape", "1x3x4", "--contender", "portable", "--seconds", "0.05"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.splitlines() if line.strip().startswith("1x3x4")]
    assert [row[1] for row in rows] == ["portable", "session"]
    assert rows[1][-1] == "1.00"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--threads", "0"), "threads is 0; it must be at least 1 and at most 1024, or None for every core"),
        (("--shape", "1x2"), "shape 1x2: give 3 sizes, of batch, x_len, context_len"),
        (("--shape", "1x2x9999"), "shape 1x2x9999: context_len is 9999, allowed 1 to 2048"),
        (("--contender", "eagre"), "contender 'eagre' is not known (did you mean 'eager'?); allowed: eager, sdpa"),
        (("--precision", "bf16"), "precision 'bf16' is not known (did you mean 'fp16'?); allowed: fp32, fp16"),
        (("--checkpoint", "x.pt"), "--checkpoint and --prefix are about a whole model; give --model, too"),
        (("--model", "x.py:make"), "holds a bare layer, with its weights; --model is for whole models"),
        (("--backend", "rtx", "--shape", "1x2x3", "--contender", "portable"), "has no rtx engine; build one: bca build"),
    ],
)
def test_what_cannot_be_measured_is_refused(exported: Bundle, arguments: tuple[str, ...], message: str) -> None:
    result = CliRunner().invoke(app, ["bench", str(exported.directory), *arguments])
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_contender_that_cannot_run_is_refused_by_name_and_left_out_otherwise(
    exported: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite, "find_spec", lambda package: None)
    result = CliRunner().invoke(app, ["bench", str(exported.directory), "--contender", "eager"])
    assert "contender eager cannot run here: torch is not installed" in result.stderr
    result = CliRunner().invoke(app, ["bench", str(exported.directory), "--shape", "1x3x4", "--seconds", "0.01"])
    assert "left out: eager: torch is not installed" in result.stdout
    assert "left out: openvino: openvino is not installed" in result.stdout


def test_padded_rows_keep_three_quarters(exported: Bundle) -> None:
    for length in (1, 2, 7, 100):
        kept = padded_inputs(exported.manifest.signature, {"batch": 8, "x_len": length, "context_len": length})["mask"].sum(1)
        assert kept.min() >= 0.75 * length
        assert kept.max() <= length


def test_shapes_are_read() -> None:
    assert parse_shapes(["1x64x96", "8x1x2"]) == [(1, 64, 96), (8, 1, 2)]


def test_a_grid_is_a_product_within_the_bundles_ranges(exported: Bundle) -> None:
    def shapes(**asked: Any) -> tuple[tuple[int, ...], ...]:
        return make_grid(exported.manifest, Asked(**asked)).shapes

    assert shapes() == ((1, 64, 64), (1, 512, 512), (8, 64, 64), (8, 512, 512))
    assert shapes(quick=True) == ((1, 64, 64), (1, 512, 512))
    assert shapes(batches=(99,), lengths=(3, 99999)) == ((8, 3, 3), (8, 2048, 2048))
    grid = make_grid(exported.manifest, Asked(precisions=("fp16", "fp32"), threads=(1, 2), shapes=((1, 2, 3),)))
    assert [(cell.precision, cell.threads) for cell in grid.cells] == [("fp32", 1), ("fp32", 2), ("fp16", 1), ("fp16", 2)]


def run_suite(bundle: Bundle, names: tuple[Name, ...], **asked: Any) -> Result:
    grid = Asked(seconds=0.01, threads=(1,), **asked)
    return suite.bench(bundle.source, grid, names, progress=Silent())


def test_growth_is_fitted_over_the_lengths_and_precisions_stand_apart(exported: Bundle) -> None:
    asked: dict[str, Any] = {"batches": (1,), "lengths": (8, 16), "precisions": ("fp32", "fp16")}
    result = run_suite(exported, ("portable",), **asked)
    assert [(g.contender, g.precision, g.lengths) for g in result.growth] == [
        ("portable", "fp16", (8.0, 16.0)),
        ("portable", "fp32", (8.0, 16.0)),
        ("session", "fp16", (8.0, 16.0)),
        ("session", "fp32", (8.0, 16.0)),
    ]
    by_cell = {(m.contender, m.precision, m.shape[1]): m.p50_ms for m in result.measurements}
    doubled = by_cell["portable", "fp32", 16] / by_cell["portable", "fp32", 8]
    assert result.growth[1].time_exponent == pytest.approx(np.log2(doubled), abs=1e-3)
    assert all(m.interleaved for m in result.measurements)


def test_what_does_not_fit_into_memory_together_runs_apart(exported: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "available_mb", lambda: 0.0)
    result = run_suite(exported, ("portable",), shapes=((1, 3, 4),))
    assert [(m.contender, m.interleaved, m.ratio.rounds) for m in result.measurements] == [
        ("portable", False, 7),
        ("session", False, 7),
    ]


def test_a_contender_that_fails_is_left_out_unless_it_was_asked_for(exported: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(name: Name, setting: Setting) -> None:
        if name == "plain":
            raise RuntimeError("no form for this")

    monkeypatch.setattr(suite.contenders, "prepare", fails)
    quick = run_suite(exported, (), shapes=((1, 3, 4),), quick=True)
    assert quick.left_out["plain"] == "it could not be made: no form for this"
    assert [m.contender for m in quick.measurements] == [name for name in QUICK if name != "plain"]
    with pytest.raises(BcaError, match="contender plain: it could not be made: no form for this"):
        run_suite(exported, ("plain",), shapes=((1, 3, 4),))


MODEL = """
import torch
from torch import nn
from bca_deploy.layers.reference import BidirectionalCrossAttention


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed({seed})
            self.words = nn.Embedding(9, 8)
            self.fusion = BidirectionalCrossAttention(dim=8, context_dim=8, heads=2, dim_head=4, prenorm=True)

    def forward(self, frames, words, frame_mask):
        out, context_out = self.fusion(frames, self.words(words), mask=frame_mask)
        return {{"seen": frames + out, "said": context_out}}
"""


@pytest.fixture(scope="module")
def tagger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model's bundle, with its code beside it and the code of another."""
    folder = tmp_path_factory.mktemp("tagger")
    for name, seed in (("tagger", 0), ("other", 1)):
        (folder / f"{name}.py").write_text(MODEL.format(seed=seed), encoding="utf-8")
    model = make(f"{folder}/tagger.py:Tagger")
    generator = torch.Generator().manual_seed(0)
    inputs = [
        {
            "frames": torch.randn(batch, n, 8, generator=generator),
            "words": torch.randint(3, 8, (batch, m), generator=generator),
            "frame_mask": torch.rand(batch, n, generator=generator) < 0.7,
        }
        for batch, n, m in ((2, 5, 4), (3, 7, 6))
    ]
    bca_deploy.export(model, folder / "bundle", inputs=inputs).close()
    return folder


def test_a_whole_model_is_measured_beside_what_pytorchs_exporter_makes_of_it(tagger: Path) -> None:
    command = ["bench", str(tagger / "bundle"), "--model", f"{tagger}/tagger.py:Tagger", "--length", "3", "--batch", "2"]
    result = CliRunner().invoke(app, [*command, "--contender", "plain", "--contender", "eager", "--seconds", "0.01", "--json"])
    assert result.exit_code == 0, result.output
    report = Result.model_validate_json(result.stdout)
    assert [m.contender for m in report.measurements] == ["eager", "plain", "session"]
    assert report.model == "Tagger"


def test_the_plain_export_of_a_whole_model_computes_it(tagger: Path, tmp_path: Path) -> None:
    with Bundle.open(tagger / "bundle") as bundle, bca_deploy.open(tagger / "bundle", threads=1) as session:
        setting = Setting(bundle, tmp_path, "fp32", 1, place=Place(f"{tagger}/tagger.py:Tagger"))
        feeds = feeds_of(bundle, dict(zip(bundle.manifest.signature.dims, (2, 6, 5), strict=True)))
        assert feeds["words"].min() >= 3  # as in the samples
        for name in ("plain", "eager"):
            prepare(name, setting)
            for ours, theirs in zip(session(**feeds), first_two(contender(name, setting, feeds)()), strict=True):
                np.testing.assert_allclose(theirs, ours, atol=3e-6)


def test_without_its_code_a_whole_model_says_how_to_give_it(tagger: Path) -> None:
    result = CliRunner().invoke(app, ["bench", str(tagger / "bundle"), "--contender", "plain"])
    assert result.exit_code == 2
    assert "contender plain cannot run here: a whole model's code is not in its bundle; give --model" in result.stderr


def test_code_that_makes_another_model_is_refused(tagger: Path) -> None:
    result = CliRunner().invoke(app, ["bench", str(tagger / "bundle"), "--model", f"{tagger}/other.py:Tagger", "--quick"])
    assert result.exit_code == 2
    assert "other.py:Tagger is not what" in result.stderr
    assert "self-test" in result.stderr
