"""Errors say what, what they got, what is allowed and what to do: for values outside a list of names, and for libraries'."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.layers import make_spec

import bca_deploy
from bca_deploy.bundle.read import Bundle
from bca_deploy.errors import InputError, check_one_of, first_line
from bca_deploy.layers.reference import BidirectionalCrossAttention
from bca_deploy.packaging import triton_repository
from bca_deploy.parity import rule
from bca_deploy.session.backends.loaded_engine import Said
from bca_deploy.spec import Interface


class WordlessError(Exception):
    """As onnxruntime and torch raise them now and then."""


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (WordlessError(), "WordlessError()"),
        (WordlessError("one\ntwo"), "one"),
        (WordlessError("\n \n  real\nmore"), "real"),
        (WordlessError(" \n"), r"WordlessError(' \n')"),
        (KeyError(""), "''"),
    ],
)
def test_the_first_line_is_the_first_with_text_or_else_the_error_itself(error: Exception, line: str) -> None:
    assert first_line(error) == line


def test_a_runtime_that_fails_without_a_word_is_a_finding_like_any_other() -> None:
    def fails(inputs: Any) -> Any:
        raise WordlessError

    assert rule.outcome(fails, {}) == "failed to run: WordlessError()"


@pytest.mark.parametrize(
    ("lines", "reason"), [([], "the library gives no reason"), (["", "\n"], "the library gives no reason")]
)
def test_a_library_that_says_nothing_gives_no_reason(lines: list[str], reason: str) -> None:
    said = Said()
    said.lines = lines
    assert said.reason() == reason
    said.lines = [*lines, "\nout of memory\nmore"]
    assert said.reason() == "out of memory"


@pytest.mark.parametrize("value", ["fast", "QUICK", "", None, 3, ["quick"], b"quick"])
def test_a_value_outside_the_names_is_refused_with_all_of_them(value: Any) -> None:
    with pytest.raises(InputError, match=r"^scope .* is not known.*; allowed: quick, full$"):
        check_one_of("scope", value, ("quick", "full"))


def test_the_closest_name_is_suggested() -> None:
    with pytest.raises(InputError, match=r"^scope 'quik' is not known \(did you mean 'quick'\?\); allowed: quick, full$"):
        check_one_of("scope", "quik", ("quick", "full"))


CALLS: dict[str, Callable[[Bundle, Path, Any], object]] = {
    "scope": lambda bundle, place, value: bca_deploy.verify(bundle, scope=value),
    "backend": lambda bundle, place, value: bca_deploy.open(bundle.directory, value),
    "precision": lambda bundle, place, value: bca_deploy.open(bundle.directory, precision=value),
    "check": lambda bundle, place, value: bca_deploy.open(bundle.directory, verify=value),
    "policy": lambda bundle, place, value: bca_deploy.open(bundle.directory).run_many([], policy=value),
    "runtime": lambda bundle, place, value: triton_repository.write(bundle, place, triton_repository.Options(runtime=value)),
    "engine.library": lambda bundle, place, value: bca_deploy.build(bundle.directory, value),
    "layer.norm": lambda bundle, place, value: make_spec(norm=value),
    "norm": lambda bundle, place, value: BidirectionalCrossAttention(dim=8, norm=value),
    "rel_pos_bias": lambda bundle, place, value: Interface(rel_pos_bias=value),
}


@pytest.mark.parametrize("name", list(CALLS))
@pytest.mark.parametrize("value", ["nonsense", 7])
def test_every_choice_that_callers_make_by_name_is_checked(exported: Bundle, tmp_path: Path, name: str, value: Any) -> None:
    with pytest.raises(InputError, match=rf"^(options: )?{name}"):
        CALLS[name](exported, tmp_path / "out", value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["lowering", "parity", "precision", "opset"])
@pytest.mark.parametrize("value", ["nonsense", 7.5])
def test_every_option_of_an_export_is_checked(tmp_path: Path, option: str, value: Any) -> None:
    with pytest.raises(InputError, match=rf"^options: {option}"):
        bca_deploy.export(BidirectionalCrossAttention(dim=8, heads=1, dim_head=8), tmp_path / "model", **{option: value})
    assert list(tmp_path.iterdir()) == []
