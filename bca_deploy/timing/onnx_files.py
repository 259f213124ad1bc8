"""ONNX files timed beside each other on onnxruntime's CPU provider, in one process."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from bca_deploy.optional import onnxruntime
from bca_deploy.timing.turns import in_turn


def opened(path: Path, threads: int) -> Any:
    """Open a file as a bundle's session does. Without spinning: the pools of several sessions would wait against each other."""
    ort = onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def side_by_side(
    sessions: Sequence[Any], feeds: Mapping[str, NDArray[Any]], rounds: int, at_least_ms: float = 0.0
) -> list[list[float]]:
    """Return for each open session the milliseconds of each round on the same inputs; see :func:`in_turn`."""
    return in_turn([partial(session.run, None, dict(feeds)) for session in sessions], rounds, at_least_ms)
