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
from bca_deploy.bundle.manifest import LayerEntry
from bca_deploy.bundle.read import Bundle
from bca_deploy.cli import app, bench
from bca_deploy.cli.bench import inputs, parse_shapes
from bca_deploy.cli.contenders import NAMES, Name, contender, obstacle, sdpa_form, write_literal
from bca_deploy.errors import InputError
from bca_deploy.spec import LayerSpec

SHAPE = (4, 9, 8)


def first_two(found: Any) -> list[np.ndarray]:
    values = list(found.values()) if hasattr(found, "values") else list(found)
    return [np.asarray(value) for value in values[:2]]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name == "compiled" else ()) for name in NAMES if name != "session"],
)
def test_every_contender_computes_the_layer_dead_rows_too(exported: Bundle, tmp_path: Path, name: Name) -> None:
    write_literal(exported, tmp_path)
    feeds = inputs(exported.manifest.signature, SHAPE)
    assert not feeds["mask"].all()  # there are dead rows
    run = contender(name, exported, tmp_path, 1, "auto", feeds)
    with bca_deploy.open(exported.directory, threads=1) as session:
        for ours, theirs in zip(session(**feeds), first_two(run()), strict=True):
            np.testing.assert_allclose(theirs, ours, atol=3e-6)


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
    eager, session = (m["peak_rss_mb"] for m in report["measurements"][:2])
    assert session < eager / 2  # no torch in the session's process
    assert report["machine"].endswith(", 1 threads")
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
        (("--threads", "0"), "threads is 0; it must be at least 1, or None for every core"),
        (("--shape", "1x2"), "shape 1x2: give 3 sizes, of batch, x_len, context_len"),
        (("--shape", "1x2x9999"), "shape 1x2x9999: context_len is 9999, allowed 1 to 2048"),
        (("--contender", "eagre"), "contender 'eagre' is not known (did you mean 'eager'?); allowed: eager, sdpa"),
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
    monkeypatch.setattr(bench, "find_spec", lambda package: None)
    result = CliRunner().invoke(app, ["bench", str(exported.directory), "--contender", "eager"])
    assert "contender eager cannot run here: torch is not installed" in result.stderr
    result = CliRunner().invoke(app, ["bench", str(exported.directory), "--shape", "1x3x4", "--seconds", "0.01"])
    assert "left out: eager: torch is not installed" in result.stdout
    assert "left out: openvino: openvino is not installed" in result.stdout


def test_padded_rows_keep_three_quarters(exported: Bundle) -> None:
    for length in (1, 2, 7, 100):
        kept = inputs(exported.manifest.signature, (8, length, length))["mask"].sum(1)
        assert kept.min() >= 0.75 * length
        assert kept.max() <= length


def test_shapes_are_read() -> None:
    assert parse_shapes(["1x64x96", "8x1x2"]) == [(1, 64, 96), (8, 1, 2)]
