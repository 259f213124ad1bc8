"""The front of a model repository: Triton runs this file. Checks, pads, calls the engine model, cuts back.

Triton batches requests of equal shape alone, so different lengths meet here: its batcher hands over whatever waits, and the
package's own rules (session/contract.py and session/padding.py, copied beside this file) say what is refused and what goes
together. Requires numpy 1 and nothing else.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from bca_deploy.errors import InputError
from bca_deploy.session.contract import Contract
from bca_deploy.session.padding import cut, grouped, stacked
from bca_deploy.signature import DimRange, Dims, Signature, Tensor

Arrays = dict[str, Any]


class TritonPythonModel:
    """What Triton calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read what the package wrote beside this file."""
        _check_numpy()
        facts = json.loads((Path(__file__).parent / "front.json").read_text(encoding="utf-8"))
        _check_tensorrt(facts["tensorrt_version"], facts["version_compatible"])
        self._engine, self._signature = facts["engine"], _signature(facts["signature"])
        self._profiles = tuple(map(_dims, facts["profiles"]))
        self._contract = Contract(self._signature, self._profiles)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer every request; what is wrong with one of them is no matter to the others."""
        answers: dict[int, Any] = {}
        ready: dict[int, Arrays] = {}
        for index, request in enumerate(requests):
            try:
                ready[index] = self._contract.check(_arrays(request))
            except InputError as error:
                answers[index] = _failed(str(error), pb_utils.TritonError.INVALID_ARG)
        for group in self._groups(ready):
            answers |= self._answer({index: ready[index] for index in group})
        return [answers[index] for index in range(len(requests))]

    def _groups(self, ready: dict[int, Arrays]) -> list[list[int]]:
        if not self._signature.pads:
            return [[index] for index in ready]
        return grouped({i: self._signature.sizes(r) for i, r in ready.items()}, self._signature, self._profiles)

    def _answer(self, group: dict[int, Arrays]) -> dict[int, Any]:
        alone, members = not self._signature.pads, list(group.values())
        batch = members[0] if alone else stacked(members, self._signature)
        names = [tensor.name for tensor in self._signature.outputs]
        response = pb_utils.InferenceRequest(
            model_name=self._engine,
            requested_output_names=names,
            inputs=[pb_utils.Tensor(name, array) for name, array in batch.items()],
            preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
        ).exec()
        if response.has_error():
            text = f"{self._engine} failed: {response.error().message()}"
            return {index: _failed(text, pb_utils.TritonError.INTERNAL) for index in group}
        found = {name: pb_utils.get_output_tensor_by_name(response, name).as_numpy() for name in names}
        parts = [found] if alone else cut(found, [self._signature.sizes(ready) for ready in members], self._signature)
        return {index: _answered(part) for index, part in zip(group, parts, strict=True)}


def _check_numpy() -> None:
    if int(np.__version__.split(".")[0]) > 1:  # Triton's python backend then hands over wrong numbers without an error
        raise pb_utils.TritonModelException(
            f"numpy {np.__version__} is installed, and Triton's python backend is made for numpy 1; run: pip install 'numpy<2'"
        )


def _check_tensorrt(wanted: str | None, compatible: bool) -> None:
    """NVIDIA's image says in a variable which TensorRT it has; another server says so itself when it loads the engine."""
    found = os.environ.get("TRT_VERSION", "").split("+")[0]
    if wanted and found and not _takes_engines_of(found, wanted, compatible):
        needed = f"{wanted} or later" if compatible else wanted
        raise pb_utils.TritonModelException(
            f"the engine is for TensorRT {needed}, and this server has {found}; take the image with {needed}, or build the "
            "engine again with this version: bca build --engine tensorrt"
        )


def _takes_engines_of(found: str, wanted: str, compatible: bool) -> bool:
    """Compare as many numbers as both versions have: an image names fewer of them than an engine."""
    built, here = ([int(number) for number in text.split(".") if number.isdecimal()] for text in (wanted, found))
    shared = min(len(built), len(here))
    return here[:shared] >= built[:shared] if compatible else here[:shared] == built[:shared]


def _signature(found: dict[str, Any]) -> Signature:
    inputs, outputs = (
        tuple(Tensor(**tensor | {"axes": tuple(tensor["axes"])}) for tensor in found[kind]) for kind in ("inputs", "outputs")
    )
    return Signature(inputs, outputs, _dims(found["dims"]), found["batch"], found["masks"])


def _dims(found: dict[str, Any]) -> Dims:
    return Dims({name: DimRange(**sizes) for name, sizes in found.items()})


def _arrays(request: Any) -> Arrays:
    return {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}


def _answered(outputs: Arrays) -> Any:
    return pb_utils.InferenceResponse([pb_utils.Tensor(name, np.ascontiguousarray(array)) for name, array in outputs.items()])


def _failed(text: str, code: Any) -> Any:
    return pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError(text, code))
