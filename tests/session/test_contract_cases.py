"""The table of requests that the Python and the C++ runtime are both held to: tests/contract_cases.json."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (gives numpy the name bfloat16)
import numpy as np
import pytest

from bca_deploy.errors import InputError
from bca_deploy.session.contract import Contract
from bca_deploy.signature import DimRange, Dims, Signature, Tensor

TABLE = json.loads((Path(__file__).parents[1] / "contract_cases.json").read_text(encoding="utf-8"))


def dims(given: dict[str, Any]) -> Dims:
    return Dims({name: DimRange(**sizes) for name, sizes in given.items()})


def signature(case: dict[str, Any]) -> Signature:
    model = TABLE["models"][case["model"]]
    inputs = tuple(Tensor(**tensor | {"axes": tuple(tensor["axes"])}) for tensor in model["inputs"])
    ranges = model.get("dims", TABLE["dims"]) | case.get("dims", {})
    return Signature(inputs, (), dims(ranges), model.get("batch", "batch"), model.get("masks", {}))


def array(given: dict[str, Any]) -> np.ndarray:
    fill, dtype = given.get("fill", 1), given.get("dtype", "float32")
    return np.full(given["shape"], fill, "uint8").view(bool) if dtype == "bool" else np.full(given["shape"], fill, dtype)


@pytest.mark.parametrize("case", TABLE["cases"], ids=lambda case: case["case"])
def test_a_request_is_taken_or_refused_in_the_tables_words(case: dict[str, Any]) -> None:
    profiles = tuple(map(dims, TABLE["profiles"].get(case.get("profiles"), ())))
    wanted = signature(case)
    contract = Contract(wanted, profiles, TABLE["models"][case["model"]].get("left_out", {}))
    given = {name: array(entry) for name, entry in case["inputs"].items()}
    if case["error"] is None:
        ready = contract.check(contract.bind((), given), case.get("cast", False))
        assert {name: value.dtype.name for name, value in ready.items()} == {t.name: t.dtype for t in wanted.inputs}
        sizes = wanted.sizes(ready)
        assert {name: value.shape for name, value in ready.items()} == {t.name: t.shape(sizes) for t in wanted.inputs}
        return
    with pytest.raises(InputError) as error:
        contract.check(contract.bind((), given), case.get("cast", False))
    assert str(error.value) == case["error"]


def test_the_table_has_no_case_twice() -> None:
    names = [case["case"] for case in TABLE["cases"]]
    assert len(names) == len(set(names)) > 40
