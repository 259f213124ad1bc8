"""benchmarks/forms.py: three graphs of a layer are timed in turn, and the stored table is one of its own."""

import json
from pathlib import Path

import forms
import pytest


def test_a_tiny_layer_has_a_row_for_each_length_and_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "LENGTHS", (2, 3))
    monkeypatch.setattr(forms, "THREADS", (1,))
    monkeypatch.setattr(forms, "TURN_MS", 0.0)
    rows = forms.measure((8, 6, 2, 4), rounds=3)
    assert [(row["length"], row["threads"]) for row in rows] == [(2, 1), (3, 1)]
    for row in rows:
        for name in ("fused", "for onnxruntime"):
            low, middle, high = row[name]
            assert 0 < low <= middle <= high
    assert forms.line(rows[0]).startswith("| 8/6, 2 x 4 | 1 | 2 | ")


def test_what_is_stored_has_date_machine_and_every_cell() -> None:
    stored = json.loads(Path(forms.__file__).with_name("forms.json").read_text(encoding="utf-8"))
    assert {"date", "cpu", "instruction_sets", "load"} <= set(stored["machine"])
    assert len(stored["rows"]) == len(forms.LAYERS) * len(forms.LENGTHS) * len(forms.THREADS)
    assert json.loads(forms.as_json(stored["rows"]))["rows"] == stored["rows"]
