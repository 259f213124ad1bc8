"""Requests for the small layer, what it answers, and the two protocols."""

import json
from typing import Any

import numpy as np
import torch
import tritonclient.grpc as grpc_client
import tritonclient.http as http_client
from support.servers import Server
from typer.testing import CliRunner

from bca_deploy.cli import app
from bca_deploy.serving import protocol


def make(batch: int, x_len: int, context_len: int, seed: int = 0, masked: bool = True) -> dict[str, np.ndarray]:
    r = np.random.default_rng(seed)
    inputs: dict[str, np.ndarray] = {
        "x": r.standard_normal((batch, x_len, 24), np.float32),
        "context": r.standard_normal((batch, context_len, 16), np.float32),
    }
    if masked:
        inputs |= {"mask": r.random((batch, x_len)) < 0.7, "context_mask": r.random((batch, context_len)) < 0.7}
    return inputs


def truth(layer: torch.nn.Module, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    tensors = {n: torch.from_numpy(a) if a.dtype == bool else torch.from_numpy(a).double() for n, a in inputs.items()}
    with torch.no_grad():
        return [t.numpy() for t in layer(**tensors)[:2]]


def bca(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


INFER = "/v2/models/bca/infer"


def request(inputs: dict[str, np.ndarray], **more: Any) -> tuple[bytes, dict[str, str]]:
    """A REST request with binary tensors: body and headers."""
    entries = [
        {"name": n, "datatype": protocol.DATATYPE[a.dtype.name], "shape": a.shape, "parameters": {"binary_data_size": a.nbytes}}
        for n, a in inputs.items()
    ]
    head = json.dumps({"inputs": entries, "parameters": {"binary_data_output": True}, **more}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head)), "Content-Type": "application/octet-stream"}
    return head + b"".join(a.tobytes() for a in inputs.values()), headers


def by_rest(server: Server, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    client = http_client.InferenceServerClient(server.http)
    result = client.infer("bca", [_filled(http_client, n, a) for n, a in inputs.items()])
    client.close()
    return [result.as_numpy("out"), result.as_numpy("context_out")]


def by_grpc(server: Server, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    with grpc_client.InferenceServerClient(server.grpc) as client:
        result = client.infer("bca", [_filled(grpc_client, n, a) for n, a in inputs.items()])
    return [result.as_numpy("out"), result.as_numpy("context_out")]


def _filled(library: Any, name: str, array: np.ndarray) -> Any:
    return library.InferInput(name, array.shape, protocol.DATATYPE[array.dtype.name]).set_data_from_numpy(array)


def metrics(server: Server) -> dict[str, float]:
    lines = server.get("/metrics").raise_for_status().text.splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}
