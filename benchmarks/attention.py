"""Time the masked layer side by side: PyTorch eager, its fused attention, the literal graph, the models, the session.

python benchmarks/attention.py [--shapes 1x64x64 1x512x512 1x2048x2048] [--threads 2] [--json FILE]

One process per contender and shape, in turn, so that no thread pool disturbs another. Prints median milliseconds, and the
ratio to the session; writes the same as JSON, with each process's peak memory. ``sdpa`` is PyTorch's own fused attention made
right at dead rows, ``sdpa+compile`` the same through torch.compile, ``literal`` the reference lowering, ``portable`` and
``cpu`` the two graphs of a bundle on bare onnxruntime, and ``session`` what `bca_deploy.open` gives.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
BUNDLES = ROOT / "build" / "bench"
CONTENDERS = ("eager", "sdpa", "sdpa+compile", "literal", "portable", "cpu", "session")
DIM, CONTEXT_DIM = 512, 386


def inputs(batch: int, x_len: int, context_len: int) -> dict[str, np.ndarray]:
    """A padded batch: every row keeps at least three quarters of its positions."""
    rng = np.random.default_rng(0)

    def mask(length: int) -> np.ndarray:
        return np.arange(length) < rng.integers(length * 3 // 4, length + 1, size=(batch, 1))

    x, context = (rng.standard_normal((batch, n, d)).astype(np.float32) for n, d in ((x_len, DIM), (context_len, CONTEXT_DIM)))
    return {"x": x, "context": context, "mask": mask(x_len), "context_mask": mask(context_len)}


def torch_contender(name: str, threads: int, feeds: dict[str, np.ndarray]) -> Callable[[], object]:
    import torch

    from bca_deploy.checkpoint import from_state
    from bca_deploy.checkpoint import read as read_checkpoint

    torch.set_num_threads(threads)
    layer = from_state(read_checkpoint(BUNDLES / "fused" / "weights.safetensors"), heads=8).module(torch.float32)
    tensors = {name: torch.from_numpy(array) for name, array in feeds.items()}
    run = sdpa_form(layer) if name.startswith("sdpa") else layer
    if name.endswith("+compile"):
        run = torch.compile(run)
    return lambda: run_without_grad(run, tensors)


def run_without_grad(run: Callable[..., object], tensors: dict[str, object]) -> object:
    import torch

    with torch.inference_mode():
        return run(**tensors)


def sdpa_form(layer):
    """The layer on torch's scaled_dot_product_attention, made right at dead rows: key mask inside, mean of values outside."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    def heads(t):  # type: ignore[no-untyped-def]
        return t.unflatten(-1, (layer.heads, -1)).transpose(1, 2)

    def one_way(q, k, v, own, other):  # type: ignore[no-untyped-def]
        attended = scaled_dot_product_attention(q, k, v, attn_mask=other[:, None, None, :], scale=layer.scale)
        live = own & other.any(-1, keepdim=True)
        merged = torch.where(live[:, None, :, None], attended, v.mean(-2, keepdim=True))
        return merged.transpose(1, 2).flatten(-2)

    def run(x, context, mask, context_mask):  # type: ignore[no-untyped-def]
        x, context = layer.norm(x), layer.context_norm(context)
        qk, context_qk, v, context_v = (
            heads(project(t))
            for project, t in ((layer.to_qk, x), (layer.context_to_qk, context), (layer.to_v, x), (layer.context_to_v, context))
        )
        out = layer.to_out(one_way(qk, context_qk, context_v, mask, context_mask))
        return out, layer.context_to_out(one_way(context_qk, qk, v, context_mask, mask))

    return run


def ort_contender(name: str, threads: int, feeds: dict[str, np.ndarray]) -> Callable[[], object]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    files = {"literal": "reference/models/fp32.onnx", "portable": "fused/models/fp32.onnx"}
    path = BUNDLES / files.get(name, "fused/models/fp32.onnxruntime-cpu.onnx")
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(["out", "context_out"], feeds)


def session_contender(threads: int, feeds: dict[str, np.ndarray]) -> Callable[[], object]:
    import bca_deploy

    session = bca_deploy.open(BUNDLES / "fused", threads=threads)
    return lambda: session(**feeds)


def contend(name: str, threads: int, feeds: dict[str, np.ndarray]) -> Callable[[], object]:
    if name == "session":
        return session_contender(threads, feeds)
    torch_made = name == "eager" or name.startswith("sdpa")
    return torch_contender(name, threads, feeds) if torch_made else ort_contender(name, threads, feeds)


def measure(contender: str, shape: tuple[int, int, int], threads: int) -> dict[str, object]:
    feeds = inputs(*shape)
    run = contend(contender, threads, feeds)
    for _ in range(3):
        run()
    times_ms, start = [], time.perf_counter()
    while len(times_ms) < 7 or (time.perf_counter() - start < 3 and len(times_ms) < 500):
        before = time.perf_counter()
        run()
        times_ms.append((time.perf_counter() - before) * 1e3)
    return {
        "contender": contender,
        "shape": "x".join(map(str, shape)),
        "median_ms": statistics.median(times_ms),
        "runs": len(times_ms),
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
    }


def make_bundles() -> None:
    for lowering in ("fused", "reference"):
        command = [sys.executable, "-c", "from bca_deploy.cli import main_export; main_export()", "--lowering", lowering]
        subprocess.run([*command, "--out", str(BUNDLES / lowering), "--force"], check=True, stdout=subprocess.DEVNULL)


def in_own_process(contender: str, shape: str, threads: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--contender", contender, "--shapes", shape, "--threads", str(threads)]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": str(threads)}
    )
    result: dict[str, float] = json.loads(done.stdout)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes", nargs="+", default=["1x64x64", "1x512x512", "1x2048x2048", "8x64x64", "8x512x512", "8x2048x2048"]
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--contender", choices=CONTENDERS, help="measure this one here and print JSON")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.contender:
        batch, x_len, context_len = (int(n) for n in options.shapes[0].split("x"))
        print(json.dumps(measure(options.contender, (batch, x_len, context_len), options.threads)))
        return
    make_bundles()
    results = [in_own_process(name, shape, options.threads) for shape in options.shapes for name in CONTENDERS]
    print(f"{platform.machine()}, {options.threads} threads, fp32, dims {DIM}/{CONTEXT_DIM}, 8 heads, masks; median ms")
    print(f"{'shape':>14} " + " ".join(f"{name:>22}" for name in CONTENDERS) + "   (ms, and times the session's)")
    for shape in options.shapes:
        row = {r["contender"]: r["median_ms"] for r in results if r["shape"] == shape}
        print(f"{shape:>14} " + " ".join(f"{row[name]:>14.2f} ({row[name] / row['session']:.2f}x)" for name in CONTENDERS))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
