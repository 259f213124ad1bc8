"""Load-test `bca serve` beside bare onnxruntime in this process, in one run: rate, latency, memory, time to ready.

python benchmarks/serving.py [--seconds 5] [--json FILE]

1 x 128 x 96, fp32, default layer, both masks. The server is one process, the load generator another, both on this machine;
every phase is bounded in time. ``bare`` calls the bundle's graph for onnxruntime from as many threads, all cores in each call.
The last line is the real Triton with the generated front: 64 ragged requests at once, and how often the engine model ran.
"""

import argparse
import contextlib
import http.client
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from attention import BUNDLE, make_bundle

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))  # servers.py starts and stops what is measured here
#: What calls the server, from how many threads, and the server's own options.
PHASES = (
    ("grpc", 1, ()),
    ("grpc", 4, ()),
    ("grpc", 16, ()),
    ("grpc", 16, ("--max-batch", "1")),
    ("rest", 1, ()),
    ("rest", 4, ()),
)


def inputs(x_len: int = 128, context_len: int = 96, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    x, context = (rng.standard_normal((1, n, d), np.float32) for n, d in ((x_len, 512), (context_len, 386)))
    live, context_live = np.arange(x_len) < x_len * 3 // 4, np.arange(context_len) < context_len * 3 // 4
    return {"x": x, "context": context, "mask": live[None], "context_mask": context_live[None]}


def bare() -> Callable[[], Callable[[], object]]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    path = BUNDLE / "models" / "fp32.onnxruntime-cpu.onnx"
    session, feeds = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]), inputs()
    return lambda: lambda: session.run(["out", "context_out"], feeds)


def over_grpc(address: str) -> Callable[[], Callable[[], object]]:
    from bca_deploy.serving.client import RemoteSession

    remote, given = RemoteSession(f"grpc://{address}"), inputs()
    return lambda: lambda: remote.run(given)


def over_rest(address: str) -> Callable[[], Callable[[], object]]:
    """Every thread keeps its own connection; tensors travel as bytes in both directions."""
    given = inputs()
    kinds = {"float32": "FP32", "bool": "BOOL"}
    entries = [
        {"name": n, "datatype": kinds[a.dtype.name], "shape": a.shape, "parameters": {"binary_data_size": a.nbytes}}
        for n, a in given.items()
    ]
    head = json.dumps({"inputs": entries, "parameters": {"binary_data_output": True}}).encode()
    body, headers = head + b"".join(a.tobytes() for a in given.values()), {"Inference-Header-Content-Length": str(len(head))}

    def connect() -> Callable[[], object]:
        connection = http.client.HTTPConnection(address)

        def call() -> object:
            connection.request("POST", "/v2/models/bca/infer", body, headers)
            answer = connection.getresponse()
            content = answer.read()
            if answer.status != 200:
                raise RuntimeError(content[:200])
            return np.frombuffer(content, np.float32, offset=len(content) - (128 * 512 + 96 * 386) * 4)

        return call

    return connect


def load(connect: Callable[[], Callable[[], object]], clients: int, seconds: float) -> dict[str, float]:
    """Call from so many threads for so long; every call is timed by its caller, and one that fails fails the run."""
    took: list[float] = []
    failures: list[Exception] = []
    ready = threading.Barrier(clients + 1, timeout=60)

    def client() -> None:
        try:
            calls()
        except Exception as error:
            failures.append(error)
            ready.abort()  # nobody need wait for this one

    def calls() -> None:
        call = connect()
        call()
        ready.wait()
        until = time.perf_counter() + seconds
        while (start := time.perf_counter()) < until:
            call()
            took.append(time.perf_counter() - start)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    with contextlib.suppress(threading.BrokenBarrierError):  # told below, with the failure that broke it
        ready.wait()
    began = time.perf_counter()
    for thread in threads:
        thread.join()
    spent = time.perf_counter() - began
    if failures:  # else they would only look like a lower rate
        raise RuntimeError(f"{len(failures)} of {clients} clients did not get through, the first because of {failures[0]!r}")
    p50, p99 = np.percentile(took, [50, 99]) * 1e3
    return {"clients": clients, "rps": len(took) / spent, "p50_ms": float(p50), "p99_ms": float(p99), "calls": len(took)}


def in_own_process(kind: str, clients: int, seconds: float, address: str = "") -> dict[str, float]:
    command = [sys.executable, __file__, "--generate", kind, "--clients", str(clients), "--seconds", str(seconds)]
    done = subprocess.run([*command, "--address", address], check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, float] = json.loads(done.stdout)
    return result


def generate(kind: str, clients: int, seconds: float, address: str) -> dict[str, float]:
    connect = bare() if kind == "bare" else {"grpc": over_grpc, "rest": over_rest}[kind](address)
    return load(connect, clients, seconds)


def measure(seconds: float) -> list[dict[str, object]]:
    from support.servers import bca_serve

    results: list[dict[str, object]] = [{"what": "bare", **in_own_process("bare", n, seconds)} for n in (1, 4, 16)]
    with tempfile.TemporaryDirectory() as place:
        for kind, clients, options in PHASES:
            began = time.perf_counter()
            with bca_serve(BUNDLE, Path(place) / "log", *options) as server:
                ready_s, idle_mb = time.perf_counter() - began, server.rss_mb()
                address = server.grpc if kind == "grpc" else server.http
                found = in_own_process(kind, clients, seconds, address)
                memory = {"ready_s": ready_s, "idle_rss_mb": idle_mb, "rss_mb": server.rss_mb()}
            results.append({"what": " ".join((kind, *options)), **found, **memory})
    return results


def ragged_on_triton() -> dict[str, int]:
    """64 requests of 16 to 512 rows at once through the generated front."""
    import tritonclient.grpc as library
    from support.servers import put_stand_in, tritonserver

    from bca_deploy.bundle.read import Bundle
    from bca_deploy.packaging.triton_repository import Options, write
    from bca_deploy.serving.client import RemoteSession

    lengths = np.random.default_rng(0).integers(16, 513, (64, 2))
    requests = [inputs(int(n), int(m), seed) for seed, (n, m) in enumerate(lengths)]
    with tempfile.TemporaryDirectory() as place, Bundle.open(BUNDLE) as bundle:
        put_stand_in(write(bundle, Path(place) / "models", Options())[1])
        with (
            tritonserver(Path(place) / "models", Path(place) / "log") as server,
            RemoteSession(f"grpc://{server.grpc}") as remote,
            library.InferenceServerClient(server.grpc) as client,
        ):
            remote.run(requests[0])
            before = engine_runs(client)
            with ThreadPoolExecutor(len(requests)) as pool:
                list(pool.map(remote.run, requests))  # a failure of one is raised here
            return {"requests": len(requests), "engine_runs": engine_runs(client) - before}


def engine_runs(client: object) -> int:
    return int(client.get_inference_statistics("bca_engine").model_stats[0].execution_count)  # type: ignore[attr-defined]


def show(results: list[dict[str, object]], triton: dict[str, int] | None) -> None:
    print(f"{platform.machine()}, {os.cpu_count()} cores, fp32, 1 x 128 x 96, masks; client and server on the same cores")
    print(f"{'':>22} {'clients':>7} {'rps':>7} {'x bare':>7} {'p50 ms':>7} {'p99 ms':>7} {'ready s':>8} {'RSS MB':>7}")
    rates = {r["clients"]: r["rps"] for r in results if r["what"] == "bare"}
    for r in results:
        own = f" {r['ready_s']:>8.2f} {r['rss_mb']:>7.0f}" if "ready_s" in r else ""
        times = f"{r['rps'] / rates[r['clients']]:>7.2f} {r['p50_ms']:>7.1f} {r['p99_ms']:>7.1f}"  # type: ignore[operator,index]
        print(f"{r['what']:>22} {r['clients']:>7} {r['rps']:>7.0f} {times}{own}")
    if triton:
        print(f"Triton front: {triton['requests']} ragged requests, {triton['engine_runs']} engine runs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each phase")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--generate", choices=("bare", "grpc", "rest"), help="generate this load here and print JSON")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--address", default="")
    options = parser.parse_args()
    if options.generate:
        print(json.dumps(generate(options.generate, options.clients, options.seconds, options.address)))
        return
    make_bundle()
    results = measure(options.seconds)
    triton = ragged_on_triton() if sys.version_info < (3, 13) else None
    show(results, triton)
    if options.json:
        options.json.write_text(json.dumps({"load": results, "triton": triton}, indent=1) + "\n")


if __name__ == "__main__":
    main()
