"""`benchmarks/verdict.py`: its figures are counted right, every layer is tried once, and what was interrupted goes on."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import verdict
from defects import DEFECTS
from layers import structure

FINE = {"passed": True, "ratio": 1.2, "limit": 1.5, "orders": 0, "seconds": 36.0, "failures": []}


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The layers that were judged, by a judge who lets all pass; findings go to a folder of their own."""
    seen: list[str] = []

    def try_draw(traced: list[int], draw: int) -> dict[str, Any]:
        seen.append(f"{traced[0]}.{draw}")
        return FINE

    monkeypatch.setattr(verdict, "FOUND", tmp_path)
    monkeypatch.setattr(verdict, "exported", lambda made, precision: [made.seed])
    monkeypatch.setattr(verdict, "try_draw", try_draw)
    return seen


def options(**changes: Any) -> argparse.Namespace:
    return argparse.Namespace(
        **{"layers": 20, "first_seed": 5, "workers": 2, "share": 0, "only": None, "update": False} | changes
    )


def test_workers_share_the_layers_and_none_is_tried_twice(tried: list[str]) -> None:
    for share in (0, 1):
        verdict.judge_right_layers(verdict.SETTINGS["fp32"], options(share=share))
    assert sorted(tried) == sorted(f"{seed}.{draw}" for seed, draws in ((5, 15), (6, 5)) for draw in range(draws))


def test_what_was_interrupted_goes_on_where_it_stopped(tried: list[str], tmp_path: Path) -> None:
    verdict.append(tmp_path / "alarms" / "fp32.jsonl", {"layer": "5.3", **FINE})
    verdict.judge_right_layers(verdict.SETTINGS["fp32"], options(workers=1))
    assert len(tried) == 19
    assert "5.3" not in tried
    verdict.judge_right_layers(verdict.SETTINGS["fp32"], options(workers=1))
    assert len(tried) == 19


def test_the_table_counts_layers_alarms_and_hours(tried: list[str], tmp_path: Path) -> None:
    path = tmp_path / "alarms" / "fp16.jsonl"
    for index in range(99):
        verdict.append(path, {"layer": f"0.{index}", **FINE})
    with path.open("a") as file:
        file.write(json.dumps({"layer": "0.99", **FINE, "passed": False, "ratio": 3.0, "orders": 8}) + "\n")
    assert list(verdict.alarm_table())[2:] == ["| fp16 | 100 | 1 | 4.66% | 2.00 | 1, 1 | 1.00 |"]


@pytest.mark.parametrize(("wrong", "count", "bound"), [(0, 3000, 0.000998), (0, 300, 0.009936), (1, 100, 0.046559)])
def test_the_bound_is_clopper_and_pearsons(wrong: int, count: int, bound: float) -> None:
    assert verdict.upper_bound(wrong, count) == pytest.approx(bound, rel=1e-3)


def test_a_seed_always_gives_the_same_layer() -> None:
    first, again = (structure(3).weights(2).state for _ in range(2))
    assert all((first[name] == again[name]).all() for name in first)
    assert {structure(seed).spec for seed in range(20)} != {structure(3).spec}


def test_there_are_at_least_fourteen_defects_each_in_layers_that_have_it() -> None:
    assert len({defect.name for defect in DEFECTS}) == len(DEFECTS) >= 14
    for defect in DEFECTS:
        assert defect.applies(structure(11, defect.applies))


@pytest.mark.slow
def test_the_script_judges_a_real_layer_and_a_real_defect(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(verdict, "FOUND", tmp_path)
    verdict.judge_right_layers(verdict.SETTINGS["fp32"], options(layers=1, workers=1))
    (finding,) = verdict.read(tmp_path / "alarms" / "fp32.jsonl")
    assert finding["passed"], finding
    verdict.plant(DEFECTS[0], "fp32", options(layers=1))
    (finding,) = verdict.read(tmp_path / "defects" / f"{DEFECTS[0].name}, fp32.jsonl")
    assert not finding["passed"]
