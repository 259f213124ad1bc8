"""Attack `bca serve` twice, and see that it answers throughout and gives its memory back.

python benchmarks/hostile.py [--quick] [--json FILE]

At once, on this machine: 1,100 connections that say nothing, from many addresses, opened again when they are closed; 10,000
requests whose methods are words of up to 50 kB; 120 large requests, half of them over gRPC. Meanwhile the probes are asked all
the time. Before, the same 120 requests go in turn, once: what the process has then, half a minute later, is what it may have.
The layer is the default one, a large request is 1 x 2048 x 2048. Exits 1 where a probe fails, a status is not the protocol's
way to say no, or memory stays.
"""

import argparse
import collections
import contextlib
import http.client
import json
import random
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tritonclient.grpc import service_pb2 as pb

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))  # servers.py starts and stops what is attacked here

from support.servers import Server, bca_serve  # noqa: E402

Inputs = dict[str, np.ndarray]
#: What a server may answer: to large requests, and to methods that it has not. A closed connection is no answer.
WELL = {"200", "429", "OK", "RESOURCE_EXHAUSTED", "405", "closed"}
#: Most that may stay of an attack, against the same requests in turn, and of a second one.
FIRST, SECOND = 1.2, 1.05


@dataclass(frozen=True)
class Size:
    """Of an attack."""

    idle: int = 1100
    odd: int = 10_000
    large: int = 120
    settle_s: float = 30.0


QUICK = Size(idle=150, odd=200, large=12, settle_s=0.5)


@dataclass
class Found:
    """What came of it."""

    statuses: collections.Counter[str] = field(default_factory=collections.Counter)
    probes: int = 0
    failed_probes: list[str] = field(default_factory=list)
    slowest_probe_ms: float = 0.0
    rss_mb: dict[str, float] = field(default_factory=dict)

    def faults(self, memory: bool) -> list[str]:
        """Return what is wrong, with or without a look at memory."""
        wrong = [f"status {status}: {count}" for status, count in self.statuses.items() if status not in WELL]
        wrong += [f"{len(self.failed_probes)} of {self.probes} probes: {self.failed_probes[0]}"] if self.failed_probes else []
        warm, first, second = (self.rss_mb[name] for name in ("in turn", "first attack", "second attack"))
        if memory and first > FIRST * warm:
            wrong.append(f"memory after the first attack is {first / warm:.2f} of that before, allowed {FIRST}")
        if memory and second > SECOND * first:
            wrong.append(f"memory after the second attack is {second / first:.2f} of that after the first, allowed {SECOND}")
        return wrong


def attack(server: Server, inputs: Inputs, size: Size) -> Found:
    """Warm the server up, then attack it twice."""
    found, calls = Found(), large_calls(server, inputs)
    for index in range(size.large):
        found.statuses[calls[index % 2]()] += 1
    found.rss_mb["in turn"] = settled(server, size)
    for name in ("first attack", "second attack"):
        with probing(server, found), idle(server, size.idle):
            at_once(found, calls, size, server)
        found.rss_mb[name] = settled(server, size)
    return found


def settled(server: Server, size: Size) -> float:
    time.sleep(size.settle_s)
    return server.rss_mb()


def at_once(found: Found, calls: tuple[Callable[[], str], Callable[[], str]], size: Size, server: Server) -> None:
    start = threading.Barrier(size.large)

    def large(index: int) -> str:
        start.wait()
        return calls[index % 2]()

    with ThreadPoolExecutor(size.large + 4) as pool:
        waiting = [pool.submit(large, index) for index in range(size.large)]
        waiting += [pool.submit(odd_method, server, seed) for seed in range(size.odd)]
        found.statuses.update(one.result() for one in waiting)


def large_calls(server: Server, inputs: Inputs) -> tuple[Callable[[], str], Callable[[], str]]:
    """Return a call over REST and one over gRPC, each on a connection of its own; both give the status."""
    from support.requests import INFER, request

    body, headers = request(inputs)
    message = pb.ModelInferRequest(model_name="bca", raw_input_contents=[a.tobytes() for a in inputs.values()])
    for name, array in inputs.items():
        message.inputs.add(name=name, datatype="BOOL" if array.dtype == bool else "FP32", shape=array.shape)
    sent = message.SerializeToString()
    options = [
        ("grpc.max_receive_message_length", -1),
        ("grpc.max_send_message_length", -1),
        ("grpc.use_local_subchannel_pool", 1),
    ]

    def over_rest() -> str:
        return asked(server, "POST", INFER, body, headers)

    def over_grpc() -> str:
        with grpc.insecure_channel(server.grpc, options) as channel:
            call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
            try:
                call(sent, timeout=600)
            except grpc.RpcError as error:
                return str(error.code().name)
            return "OK"

    return over_rest, over_grpc


def odd_method(server: Server, seed: int) -> str:
    chosen = random.Random(seed)
    method = "".join(chosen.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=12)) + "X" * chosen.choice((0, 0, 100, 5_000, 50_000))
    return asked(server, method, "/v2/models/bca", None, {})


def asked(server: Server, method: str, path: str, body: bytes | None, headers: dict[str, str]) -> str:
    connection = http.client.HTTPConnection(server.http, timeout=600)
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        answer.read()
        return str(answer.status)
    except (ConnectionError, http.client.BadStatusLine):  # closed while it wrote; there was no status to read
        return "closed"
    finally:
        connection.close()


@contextlib.contextmanager
def idle(server: Server, count: int) -> Iterator[None]:
    """Connections that say nothing, one in ten of them to gRPC's port; those that are closed are opened again."""
    ended, opened = threading.Event(), dict[int, socket.socket]()

    def keep() -> None:
        while not ended.is_set():
            for index in range(count):
                if index not in opened or gone(opened[index]):
                    opened[index] = silent(server.grpc if index % 10 == 0 else server.http, index)
            ended.wait(0.5)

    thread = threading.Thread(target=keep)
    thread.start()
    while len(opened) < count and thread.is_alive():
        time.sleep(0.01)
    try:
        yield
    finally:
        ended.set()
        thread.join()
        for connection in opened.values():
            connection.close()


def silent(address: str, index: int) -> socket.socket:
    host, port = address.rsplit(":", 1)
    source = f"127.0.0.{2 + index % 200}" if index % 2 else "127.0.0.1"
    return socket.create_connection((host, int(port)), timeout=60, source_address=(source, 0))


def gone(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        while data := connection.recv(65536):
            del data
        connection.close()
        return True
    except BlockingIOError:
        return False
    except OSError:
        return True


@contextlib.contextmanager
def probing(server: Server, found: Found) -> Iterator[None]:
    """Ask the probes all the time, as an orchestrator does: each on a connection of its own, with ten seconds to answer."""
    ended = threading.Event()

    def ask() -> None:
        while not ended.is_set():
            for name, probe in (("live", rest_probe("live")), ("ready", rest_probe("ready")), ("grpc", grpc_probe)):
                began = time.perf_counter()
                try:
                    probe(server)
                except Exception as error:
                    found.failed_probes.append(f"{name}: {error!r}"[:300])
                found.probes += 1
                found.slowest_probe_ms = max(found.slowest_probe_ms, (time.perf_counter() - began) * 1e3)
            ended.wait(0.1)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def rest_probe(name: str) -> Callable[[Server], None]:
    def probe(server: Server) -> None:
        connection = http.client.HTTPConnection(server.http, timeout=10)
        connection.request("GET", f"/v2/health/{name}")
        status = connection.getresponse().status
        connection.close()
        if status != 200:
            raise RuntimeError(f"status {status}")

    return probe


def grpc_probe(server: Server) -> None:
    with grpc.insecure_channel(server.grpc, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10, wait_for_ready=True)
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        raise RuntimeError(f"status {answer.status}")


def large_inputs(x_width: int, context_width: int, length: int) -> Inputs:
    rng = np.random.default_rng(0)
    x, context = (rng.standard_normal((1, length, width), np.float32) for width in (x_width, context_width))
    live = np.arange(length)[None] < length * 3 // 4
    return {"x": x, "context": context, "mask": live, "context_mask": live}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small attack, which says nothing of memory")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    from attention import BUNDLE, make_bundle

    make_bundle()
    with tempfile.TemporaryDirectory() as place:
        with bca_serve(BUNDLE, Path(place) / "log") as server:
            found = attack(server, large_inputs(512, 386, 2048), QUICK if options.quick else Size())
        log_mb = (Path(place) / "log").stat().st_size / 1e6
    faults = found.faults(memory=not options.quick)
    print(f"answers: {dict(found.statuses)}; probes: {found.probes}, slowest {found.slowest_probe_ms:.0f} ms")
    print(f"RSS in MB: {found.rss_mb}; log {log_mb:.1f} MB")
    print("\n".join(faults) or "nothing is wrong")
    if options.json:
        options.json.write_text(json.dumps(vars(found) | {"log_mb": log_mb, "faults": faults}, indent=1) + "\n")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
