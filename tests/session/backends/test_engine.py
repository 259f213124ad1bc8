"""An engine behind the session, on a double that is strict where a GPU is merely undefined: see gpu_double.py."""

import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from support.gpu_double import ContextDouble, DeviceTensor, EngineDouble, Machine, machine
from support.requests import make
from support.rounding import assert_same
from support.servers import PATIENCE_S

import bca_deploy
from bca_deploy.bundle.manifest import EngineEntry
from bca_deploy.bundle.read import Bundle
from bca_deploy.errors import BcaError, EngineError, InputError
from bca_deploy.session import arrays
from bca_deploy.session.backends.engine_runner import engine_runner
from bca_deploy.session.session import Session

SHORT = {"batch": {"min": 1, "opt": 1, "max": 2}, "x_len": {"min": 1, "opt": 8, "max": 16}}
LONG = {"batch": {"min": 2, "opt": 4, "max": 8}, "x_len": {"min": 1, "opt": 64, "max": 128}}


@pytest.fixture(scope="module")
def built(exported: Bundle, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, EngineEntry]:
    path = Path(shutil.copytree(exported.directory, tmp_path_factory.mktemp("engine") / "model"))
    return path, bca_deploy.build(path, targets=["sm89"], profiles=[SHORT, LONG])


@pytest.fixture
def path(built: tuple[Path, EngineEntry]) -> Path:
    return built[0]


@pytest.fixture
def gpu(built: tuple[Path, EngineEntry], monkeypatch: pytest.MonkeyPatch) -> Machine:
    return machine(monkeypatch, *built)


@pytest.fixture
def session(path: Path, gpu: Machine) -> Iterator[Session]:
    with bca_deploy.open(path, backend="rtx") as opened:
        yield opened


@pytest.fixture(scope="module")
def expected(built: tuple[Path, EngineEntry]) -> Iterator[Callable[..., tuple[np.ndarray, ...]]]:
    """The fp16 model on the CPU, by itself."""
    with bca_deploy.open(built[0], backend="onnxruntime-cpu", precision="fp16", threads=1) as opened:
        yield opened


def umask() -> int:
    found = os.umask(0o022)
    os.umask(found)
    return found


def same(got: Any, wanted: Any) -> None:
    assert_same(got, wanted, "fp16")


# ---- the choice


def test_auto_takes_the_engine_and_says_why_nothing_before_it(path: Path, gpu: Machine) -> None:
    with bca_deploy.open(path) as opened:
        assert opened.explain().chosen.startswith("rtx: engines/rtx-fp16.engine on rtx 1.7.1")
        assert [name for name, _ in opened.explain().passed_over] == ["tensorrt"]
        assert opened.dims["x_len"].max == 128
        assert opened.dims["batch"].max == 8


def test_a_damaged_engine_falls_back_only_in_auto_and_says_so(path: Path, gpu: Machine, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(path, tmp_path / "broken"))
    engine = broken / "engines/rtx-fp16.engine"
    engine.write_bytes(b"\0" * engine.stat().st_size)
    with pytest.raises(EngineError, match=r"^rtx-fp16.engine does not open here: the engine's header is damaged$"):
        bca_deploy.open(broken, backend="rtx", verify="size")
    with bca_deploy.open(broken, verify="size") as opened:
        assert opened.explain().chosen.startswith("onnxruntime-cpu")
        assert ("rtx", "rtx-fp16.engine does not open here: the engine's header is damaged") in opened.explain().passed_over


def test_an_engine_for_another_gpu_is_refused_with_the_command(path: Path, built: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, *built, capability="sm120")
    with pytest.raises(EngineError, match=r"built for sm89, and the GPU is sm120; rebuild it: bca build .* --target sm89"):
        bca_deploy.open(path, backend="rtx")


def test_a_precision_without_an_engine_is_refused_with_the_command(path: Path, gpu: Machine) -> None:
    with pytest.raises(EngineError, match=r"has no rtx engine of precision fp32; build one: bca build .* --precision fp32$"):
        bca_deploy.open(path, backend="rtx", precision="fp32")


def test_an_engine_that_is_not_the_manifests_is_refused(path: Path, built: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = built[1]
    machine(monkeypatch, path, entry.model_copy(update={"profiles": entry.profiles[:1]}))
    with pytest.raises(EngineError, match="is not the engine that the manifest describes; rebuild it: bca build"):
        bca_deploy.open(path, backend="rtx")


# ---- a call


@pytest.mark.parametrize("sizes", [(1, 3, 5), (2, 16, 40), (8, 128, 7), (2, 17, 1)])
def test_the_engine_gives_what_its_model_gives(session: Session, expected: Any, sizes: tuple[int, int, int]) -> None:
    inputs = make(*sizes)
    same(session(**inputs), expected(**inputs))


def test_masks_left_out_are_all_true(session: Session, expected: Any) -> None:
    inputs = make(2, 5, 6, masked=False)
    same(session(**inputs), expected(**inputs))


@pytest.mark.parametrize(
    ("sizes", "profile"),
    [((1, 8, 4), 0), ((2, 8, 4), 0), ((2, 16, 4), 0), ((2, 17, 4), 1), ((3, 8, 4), 1), ((1, 16, 4), 0)],
)
def test_the_nearest_profile_that_fits_runs(session: Session, gpu: Machine, sizes: Any, profile: int) -> None:
    session(**make(*sizes))
    assert gpu.engines[0].contexts[0].active_optimization_profile == profile


def test_sizes_between_the_profiles_are_refused(session: Session, gpu: Machine) -> None:
    before = len(gpu.gpu.allocated)
    hole = (
        r"^no optimization profile of the engine holds batch 1, x_len 17, context_len 4; it has batch 1 to 2, x_len 1 to 16, "
        r"context_len 1 to 2048; or batch 2 to 8, x_len 1 to 128, context_len 1 to 2048; pad and mask the padding, split the "
        r"batch, or build the engine with a profile for it$"
    )
    with pytest.raises(InputError, match=hole):
        session(**make(1, 17, 4))
    with pytest.raises(InputError, match=hole):
        session(**on_gpu(make(1, 17, 4)))
    with pytest.raises(
        InputError, match=r"^input x: axis 1 \(x_len\) is 1000000000, allowed 1 to 128; a sequence cannot be cut, .*; build the"
    ):
        session(np.broadcast_to(np.float32(0), (1, 10**9, 24)), make(1, 1, 4)["context"])
    with pytest.raises(
        InputError,
        match=r"^input x: axis 1 \(x_len\) is 100000000000, allowed 1 to 128; a sequence cannot be cut, .*; build the",
    ):
        session(np.broadcast_to(np.float64(0), (1, 10**11, 24)), make(1, 1, 4)["context"], cast=True)
    assert len(gpu.gpu.allocated) == before
    assert session.metrics().calls == 0  # nothing reached the engine


def test_a_refused_request_leaves_graphs_and_buffers_as_they_are(path: Path, gpu: Machine) -> None:
    with bca_deploy.open(path, backend="rtx", contexts=1, cuda_graphs=4) as session:
        session(**make(1, 8, 4))
        kept = len(gpu.gpu.allocated), gpu.gpu.captures, len(gpu.engines[0].contexts)
        with pytest.raises(InputError):
            session(**make(1, 17, 4))
        session(**make(1, 8, 4))
        assert (len(gpu.gpu.allocated), gpu.gpu.captures, len(gpu.engines[0].contexts)) == kept


def test_buffers_grow_and_are_used_again(session: Session, gpu: Machine, expected: Any) -> None:
    for length in (4, 3, 4, 1):
        session(**make(2, length, length))
    after = len(gpu.gpu.allocated)
    assert after == 7  # four inputs, two outputs, scratch
    for length in (16, 15, 12, 16):
        inputs = make(2, length, length)
        same(session(**inputs), expected(**inputs))
    assert len(gpu.gpu.allocated) == after + 6
    assert max(gpu.gpu.allocated) < 16 * 24 * 4 * 4 * 2


def test_inputs_are_not_copied_on_the_way(session: Session, gpu: Machine) -> None:
    inputs = make(2, 8, 8)
    session(**inputs)
    assert {array.ctypes.data for array in inputs.values()} == set(gpu.gpu.uploaded)


def test_views_with_gaps_give_the_same(session: Session, expected: Any) -> None:
    inputs = make(2, 16, 8)
    views = inputs | {"x": inputs["x"][:, ::2], "mask": inputs["mask"][:, ::2]}
    same(session(**views), expected(**views))


def test_run_into_writes_into_the_callers_arrays(session: Session, expected: Any) -> None:
    inputs = make(2, 5, 6)
    outputs = {"out": np.zeros((2, 5, 24), np.float32), "context_out": np.zeros((2, 6, 16), np.float32)}
    session.run_into(inputs, outputs)
    same(outputs.values(), expected(**inputs))


@pytest.mark.parametrize("of", [lambda array: array, lambda array: DeviceTensor(array, written=True)], ids=["cpu", "gpu"])
def test_run_into_refuses_outputs_that_overlap_anything(session: Session, of: Any) -> None:
    inputs, memory = make(2, 5, 5), np.zeros(2 * 5 * (24 + 16), np.float32)
    given = {name: of(array) for name, array in inputs.items()}
    out, context_out = memory[:240].reshape(2, 5, 24), memory[240:].reshape(2, 5, 16)
    with pytest.raises(InputError, match=r"^output out overlaps input x in memory; give each output memory of its own$"):
        session.run_into(given, {"out": of(inputs["x"]), "context_out": of(context_out)})
    with pytest.raises(InputError, match=r"^output context_out overlaps output out in memory; "):
        session.run_into(given, {"out": of(out), "context_out": of(memory[239:399].reshape(2, 5, 16))})
    session.run_into(given, {"out": of(out), "context_out": of(context_out)})


# ---- arrays on the GPU


def on_gpu(inputs: dict[str, np.ndarray]) -> dict[str, DeviceTensor]:
    return {name: DeviceTensor(array.copy()) for name, array in inputs.items()}


@pytest.mark.parametrize("graphs", [0, 2])
def test_what_comes_from_the_gpu_goes_back_there(path: Path, gpu: Machine, expected: Any, graphs: int) -> None:
    with bca_deploy.open(path, backend="rtx", cuda_graphs=graphs) as session:
        for seed in range(3):
            inputs = make(2, 5, 6, seed)
            outputs = session(**on_gpu(inputs))
            assert all(isinstance(output, DeviceTensor) for output in outputs)
            same([output.array for output in outputs], expected(**inputs))
    assert gpu.gpu.uploaded == []


def test_one_input_on_the_gpu_is_enough(session: Session, gpu: Machine, expected: Any) -> None:
    inputs = make(2, 5, 6)
    outputs = session(DeviceTensor(inputs["x"].copy()), inputs["context"])
    same([output.array for output in outputs], expected(inputs["x"], inputs["context"]))


def test_arrays_on_the_gpu_are_checked_like_others(session: Session) -> None:
    inputs = on_gpu(make(2, 5, 6))
    with pytest.raises(InputError, match=r"^input x has dtype float64, and needs float32; convert it on the GPU$"):
        session(**inputs | {"x": DeviceTensor(np.zeros((2, 5, 24)))}, cast=True)
    with pytest.raises(InputError, match=r"^input mask: axis 1 \(x_len\) is 4, but x has 5; they must agree$"):
        session(**inputs | {"mask": DeviceTensor(np.ones((2, 4), bool))})
    with pytest.raises(InputError, match=r"^input x has gaps between its elements; give a C-contiguous array$"):
        session(**inputs | {"x": DeviceTensor(np.zeros((2, 10, 24), np.float32)[:, ::2])})
    with pytest.raises(InputError, match=r"^pair 1: requests that run together have their arrays on the CPU; call the session"):
        session.run_many([tuple(make(1, 3, 4).values()), tuple(inputs.values())])


def test_a_mask_of_other_bytes_is_refused_on_the_cpu_and_made_anew_on_the_gpu(session: Session) -> None:
    inputs = make(2, 5, 6)
    mask = (inputs["mask"].astype(np.uint8) * 255).view(bool)
    with pytest.raises(InputError, match=r"^input mask: a bool is one byte of 0 or 1, and here is one of 255; "):
        session(**inputs | {"mask": mask})
    # What torch's tensors on the GPU go through; no GPU is needed to see that bytes come out as 0 and 1.
    made = arrays._plain(torch.from_numpy(mask))
    assert made.dtype == torch.bool
    np.testing.assert_array_equal(made.view(torch.uint8).numpy(), inputs["mask"].astype(np.uint8))


def test_a_session_on_the_cpu_takes_no_arrays_of_a_gpu(exported: Bundle) -> None:
    with bca_deploy.open(exported.directory) as session, pytest.raises(InputError, match="does not come as a CPU array"):
        session(**on_gpu(make(1, 2, 3)))


# ---- errors


@pytest.mark.parametrize(
    ("refuses", "message"),
    [
        ("execute_async_v3", "the engine refused the call: the library gives no reason"),
        ("set_tensor_address", "the engine refused the address of x: the library gives no reason"),
        ("set_input_shape", r"the engine refused shape \[4, 5, 24\] of x: the library gives no reason"),
        ("set_optimization_profile_async", "the engine refused profile 1: the library gives no reason"),
        ("infer_shapes", "the engine refused the shapes: they leave x, context, mask, context_mask open: the library"),
    ],
)
def test_a_call_that_fails_gives_no_outputs_and_the_next_is_right(
    session: Session, gpu: Machine, expected: Any, refuses: str, message: str
) -> None:
    inputs = make(4, 5, 6)
    outputs = {"out": np.zeros((4, 5, 24), np.float32), "context_out": np.zeros((4, 6, 16), np.float32)}
    gpu.engines[0].refuses = refuses
    with pytest.raises(EngineError, match=f"^{message}"):
        session(**inputs)
    with pytest.raises(EngineError, match=f"^{message}"):
        session.run_into(inputs, outputs)
    assert not any(array.any() for array in outputs.values())
    gpu.engines[0].refuses = ""
    same(session(**inputs), expected(**inputs))
    assert (session.metrics().calls, session.metrics().failures) == (3, 2)


def test_the_librarys_own_reason_is_given(session: Session, gpu: Machine) -> None:

    def fails(self: Any, handle: int) -> bool:
        session._backend._pool.engine.said.lines.append("out of memory\nand more")  # type: ignore[attr-defined]
        return False

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ContextDouble, "execute_async_v3", fails)
        with pytest.raises(EngineError, match=r"^the engine refused the call: out of memory$"):
            session(**make(1, 2, 3))
    assert session(**make(1, 2, 3))


def test_what_cuda_raises_while_waiting_is_the_calls(session: Session, gpu: Machine, expected: Any) -> None:
    inputs = make(1, 2, 3)
    session(**inputs)
    for stream in gpu.gpu.streams.values():
        stream.broken = "CUDA error: an illegal memory access was encountered\nmore"
    with pytest.raises(EngineError, match=r"^the call failed on the GPU: CUDA error: an illegal memory access was encounter"):
        session(**inputs)
    for stream in gpu.gpu.streams.values():
        stream.broken = ""
    same(session(**inputs), expected(**inputs))


@pytest.mark.parametrize("what", ["context", "stream"])
def test_an_engine_that_gets_nothing_to_run_with_is_found_out_when_it_is_opened(
    path: Path, gpu: Machine, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    if what == "context":
        monkeypatch.setattr(EngineDouble, "create_execution_context", lambda self, strategy: None)
        message = "^the engine gets no execution context: the library gives no reason; open it with fewer contexts, or on ano"
    else:
        gpu.gpu.streams_fail = True
        message = "^preparing the engine failed on the GPU: CUDA error: out of memory$"
    with pytest.raises(EngineError, match=message):
        bca_deploy.open(path, backend="rtx")
    with bca_deploy.open(path) as opened:
        assert opened.explain().chosen.startswith("onnxruntime-cpu")
        assert dict(opened.explain().passed_over)["rtx"].startswith(message.removeprefix("^")[:40])


# ---- as parity runs it


@pytest.fixture
def runner(path: Path, built: tuple[Path, EngineEntry], gpu: Machine) -> Any:
    return engine_runner(path / built[1].file, "rtx")


def test_parity_runs_the_engine_file_itself(runner: Any, expected: Any) -> None:
    inputs = make(2, 16, 5)
    found = runner(inputs)
    same((found["out"], found["context_out"]), expected(**inputs))


def test_what_the_engine_does_not_write_is_nan(runner: Any, gpu: Machine) -> None:
    assert np.isfinite(runner(make(1, 3, 4))["out"]).all()
    gpu.engines[0].writes = False
    outputs = runner(make(1, 3, 4))
    assert all(np.isnan(output).all() for output in outputs.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.zeros((2, 8, 24), np.float16)}, "^input x is float16; the engine takes float32$"),
        ({"mask": np.ones((2, 8), np.uint8)}, "^input mask is uint8; the engine takes bool$"),
        ({"bias": np.zeros(1)}, r"^inputs \['bias', 'context', 'context_mask', 'mask', 'x'\]; the engine takes \['context"),
    ],
)
def test_inputs_that_the_engine_would_misread_are_refused(runner: Any, change: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        runner(make(2, 8, 8) | change)


def test_a_static_engine_takes_its_shapes_and_no_other(
    exported: Bundle, expected: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(exported.directory, tmp_path / "static"))
    fixed = {name: {"min": n, "opt": n, "max": n} for name, n in (("batch", 2), ("x_len", 8), ("context_len", 5))}
    entry = bca_deploy.build(copy, targets=["sm89"], profiles=[fixed])
    assert entry.static
    machine(monkeypatch, copy, entry)
    with bca_deploy.open(copy, backend="rtx") as session:
        inputs = make(2, 8, 5)
        same(session(**inputs), expected(**inputs))
        with pytest.raises(InputError, match=r"^input x: axis 1 \(x_len\) is 9, allowed 8 to 8; "):
            session(**make(2, 9, 5))


# ---- threads


def test_arrays_of_the_gpu_are_waited_for_whichever_thread_comes_first(path: Path, gpu: Machine, expected: Any) -> None:
    stream, begin = gpu.gpu.stream, threading.Barrier(4)
    cases = [make(1, 3, 4, seed) for seed in range(4)]

    def slowly() -> Any:
        time.sleep(0.05)
        return stream()

    with bca_deploy.open(path, backend="rtx", contexts=4) as session:
        gpu.gpu.stream = slowly  # type: ignore[method-assign]

        def work(case: dict[str, np.ndarray]) -> Any:
            begin.wait()
            return [output.array for output in session(**on_gpu(case))]

        with ThreadPoolExecutor(4) as pool:
            for case, found in zip(cases, pool.map(work, cases), strict=True):
                same(found, expected(**case))


def test_sixteen_threads_of_different_shapes_never_mix_results(path: Path, gpu: Machine, expected: Any) -> None:
    cases = [make(1 + i % 2, 1 + i, 16 - i, seed=i) for i in range(16)]
    wanted = [expected(**case) for case in cases]
    for graphs in (0, 4):
        with bca_deploy.open(path, backend="rtx", contexts=3, cuda_graphs=graphs) as session:
            barrier = threading.Barrier(16)

            def work(index: int, session: Session = session, barrier: threading.Barrier = barrier) -> None:
                barrier.wait()
                for _ in range(6):
                    same(session(**cases[index]), wanted[index])

            with ThreadPoolExecutor(16) as pool:
                list(pool.map(work, range(16)))
            assert session.metrics().calls == 96


def test_no_more_contexts_work_at_once_than_were_asked_for_and_those_overlap(path: Path, gpu: Machine) -> None:
    with bca_deploy.open(path, backend="rtx", contexts=2) as session:
        engine, running, most = gpu.engines[0], [0], [0]
        lock, compute, met = threading.Lock(), engine.compute, threading.Barrier(2)

        class Counted:
            def run(self, inputs: dict[str, np.ndarray]) -> Any:
                with lock:
                    running[0] += 1
                    most[0] = max(most[0], running[0])
                met.wait(PATIENCE_S)  # each call goes on when another is in it too, however slowly the threads come
                with lock:
                    running[0] -= 1
                return compute.run(inputs)

        engine.compute = Counted()
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda seed: session(**make(1, 3, 4, seed)), range(16)))
        assert most[0] == 2
        assert len(engine.contexts) == 2


def test_a_context_that_nobody_waits_for_is_never_made(session: Session, gpu: Machine) -> None:
    for seed in range(4):
        session(**make(1, 3, 4, seed))
    assert len(gpu.engines[0].contexts) == 1


def test_contexts_bring_no_memory_of_their_own(session: Session, gpu: Machine) -> None:
    session(**make(1, 3, 4))
    assert [strategy.name for strategy in gpu.engines[0].strategies] == ["USER_MANAGED"]


# ---- many pairs


def test_run_many_never_makes_a_batch_that_no_profile_holds(
    exported: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(exported.directory, tmp_path / "holes"))
    wide = {"batch": {"min": 1, "opt": 8, "max": 8}, "x_len": {"min": 1, "opt": 8, "max": 16}}
    long = {"batch": {"min": 1, "opt": 1, "max": 2}, "x_len": {"min": 1, "opt": 64, "max": 128}}
    machine(monkeypatch, copy, bca_deploy.build(copy, targets=["sm89"], profiles=[wide, long]))
    with bca_deploy.open(copy, backend="rtx") as session:
        pairs = [tuple(make(1, 100, 8, seed).values()) for seed in range(8)]
        single = [session(*pair) for pair in pairs]
        for one, together in zip(single, session.run_many(pairs), strict=True):
            same(together, one)
        assert session.metrics().calls == 8 + 4  # two at a time


def test_run_many_pads_on_a_gpu_and_live_rows_are_as_one_by_one(session: Session, gpu: Machine) -> None:
    rng = np.random.default_rng(0)
    pairs = [tuple(make(1, int(rng.integers(1, 17)), int(rng.integers(1, 17)), seed).values()) for seed in range(40)]
    single = [session(*pair) for pair in pairs]
    before = session.metrics()
    together = session.run_many(pairs)
    after = session.metrics()
    for pair, one, many in zip(pairs, single, together, strict=True):
        for mask, other, ours, theirs in ((pair[2], pair[3], many[0], one[0]), (pair[3], pair[2], many[1], one[1])):
            live = mask & other.any(-1, keepdims=True)
            np.testing.assert_allclose(ours[live], theirs[live], atol=2e-3)
    assert after.calls - before.calls < 20
    rows = after.rows - before.rows
    assert (after.padded_rows - before.padded_rows) / rows <= 0.25


# ---- CUDA graphs


def test_a_graph_replays_its_shape_and_gives_this_calls_outputs(path: Path, gpu: Machine, expected: Any) -> None:
    with bca_deploy.open(path, backend="rtx", contexts=1, cuda_graphs=2) as session:
        for seed in range(5):
            for length in (16, 5):
                inputs = make(2, length, 4, seed)
                same(session(**inputs), expected(**inputs))
        assert gpu.gpu.captures == 2
        assert len(gpu.engines[0].contexts) == 3  # one for each graph, kept as it was when captured, and one for the rest


def test_the_least_recently_used_graph_goes_first(path: Path, gpu: Machine) -> None:
    with bca_deploy.open(path, backend="rtx", contexts=1, cuda_graphs=2) as session:
        for length in (16, 15, 16, 14, 16, 15):
            session(**make(1, length, 4))
        assert gpu.gpu.captures == 4  # 16, 15, 14 in place of 15, and 15 again


def test_a_buffer_that_grows_drops_the_graphs_that_hold_its_address(path: Path, gpu: Machine, expected: Any) -> None:
    with bca_deploy.open(path, backend="rtx", contexts=1, cuda_graphs=4) as session:
        for length in (4, 16, 4, 16):
            inputs = make(2, length, 4)
            same(session(**inputs), expected(**inputs))
        assert gpu.gpu.captures == 3


@pytest.mark.parametrize(
    ("why", "said"),
    [
        ("differs", "it does not repeat its call"),
        ("raises", "operation not permitted when stream is capturing"),
        ("says no", "the library cannot capture it"),
    ],
)
def test_shapes_that_cannot_be_captured_run_without_a_graph(
    path: Path,
    gpu: Machine,
    expected: Any,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    why: str,
    said: str,
) -> None:
    with bca_deploy.open(path, backend="rtx", contexts=1, cuda_graphs=2) as session:
        gpu.engines[0].capturable, gpu.gpu.captures_fail = why != "differs", why == "raises"
        if why == "says no":
            monkeypatch.setattr(ContextDouble, "is_stream_capturable", lambda self, stream: False, raising=False)
        with caplog.at_level(logging.WARNING, "bca_deploy.engines.compile"):
            for seed in range(3):
                inputs = make(2, 5, 4, seed)
                same(session(**inputs), expected(**inputs))
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert said in caplog.text


def test_warming_up_reaches_every_context(path: Path, gpu: Machine) -> None:
    with bca_deploy.open(path, backend="rtx", contexts=2, cuda_graphs=4) as session:
        session.warmup([(2, 16, 4), (2, 8, 4)])
        assert gpu.gpu.captures == 4
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda seed: session(**make(2, 8, 4, seed)), range(32)))
        assert gpu.gpu.captures == 4
        with pytest.raises(InputError, match="no optimization profile of the engine holds"):
            session.warmup([(1, 100, 4)])
        session.warmup([])
        session.warmup()


def test_graphs_are_no_use_for_arrays_on_the_gpu_and_cost_them_nothing(path: Path, gpu: Machine, expected: Any) -> None:
    with bca_deploy.open(path, backend="rtx", contexts=1, cuda_graphs=4) as session:
        for seed in range(3):
            inputs = make(2, 8, 4, seed)
            outputs = session(**on_gpu(inputs))
            same([output.array for output in outputs], expected(**inputs))
        assert gpu.gpu.captures == 0
        assert gpu.gpu.allocated == [4096]  # the scratch memory alone: nothing is copied


# ---- opening and closing


class RuntimeCacheDouble:
    """TensorRT-RTX's runtime cache and the configuration that carries it."""

    accepts = True

    def __init__(self) -> None:
        self.content = b""

    def deserialize(self, content: bytes) -> bool:
        self.content = content if self.accepts else b""
        return self.accepts

    def serialize(self) -> bytes:
        return self.content + b"+kernels"


class Config:
    made: ClassVar[list["Config"]] = []
    strategy: Any = None
    cache: Any = None
    dynamic_shapes_kernel_specialization_strategy: Any = None

    def __init__(self) -> None:
        self.made.append(self)

    def create_runtime_cache(self) -> RuntimeCacheDouble:
        return RuntimeCacheDouble()

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy

    def set_runtime_cache(self, cache: Any) -> None:
        self.cache = cache


@pytest.fixture
def caching(built: Any, monkeypatch: pytest.MonkeyPatch) -> Machine:

    made = EngineDouble.create_execution_context
    monkeypatch.setattr(EngineDouble, "create_runtime_config", lambda self: Config(), raising=False)
    monkeypatch.setattr(EngineDouble, "create_execution_context", lambda self, config: made(self, config.strategy))
    return machine(monkeypatch, *built, runtime_cache=RuntimeCacheDouble)


def test_the_runtime_cache_is_kept_between_processes(path: Path, caching: Machine, tmp_path: Path) -> None:
    for _ in range(2):
        with bca_deploy.open(path, backend="rtx", cache=tmp_path / "new") as session:
            session(**make(1, 2, 3))
    (written,) = (tmp_path / "new").iterdir()
    assert re.fullmatch(r"rtx-fp16-[0-9a-f]{16}\.runtime-cache", written.name)
    assert written.read_bytes() == b"+kernels+kernels"
    assert written.stat().st_mode & 0o777 == 0o666 & ~umask()
    assert [strategy.name for strategy in caching.engines[0].strategies] == ["USER_MANAGED"]


def test_a_runtime_cache_of_another_gpu_is_replaced_and_said_so(
    path: Path, caching: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(RuntimeCacheDouble, "accepts", False)
    bca_deploy.open(path, backend="rtx", cache=tmp_path).close()
    (file,) = tmp_path.iterdir()
    file.write_bytes(b"another's")
    bca_deploy.open(path, backend="rtx", cache=tmp_path).close()
    assert file.read_bytes() == b"+kernels"
    assert "is another GPU's or another version's; it will be replaced" in caplog.text


def test_a_cache_that_cannot_be_kept_fails_nothing(
    path: Path, caching: Machine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    with bca_deploy.open(path, backend="rtx", cache=tmp_path / "file") as session:
        session(**make(1, 2, 3))
    assert "is not written: " in caplog.text
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_warming_up_keeps_the_cache_as_a_server_may_never_be_closed(path: Path, caching: Machine, tmp_path: Path) -> None:
    session = bca_deploy.open(path, backend="rtx", cache=tmp_path)
    session.warmup([(1, 2, 3)])
    assert len(list(tmp_path.iterdir())) == 1
    session.close()


def test_kernels_are_compiled_before_a_call_is_captured(path: Path, caching: Machine) -> None:
    for graphs, wanted in ((0, None), (2, "EAGER")):
        Config.made.clear()
        bca_deploy.open(path, backend="rtx", cuda_graphs=graphs).close()
        found = Config.made[-1].dynamic_shapes_kernel_specialization_strategy
        assert (found and found.name) == wanted


def test_without_a_place_for_it_no_cache_is_written(path: Path, caching: Machine) -> None:
    before = sorted(path.rglob("*"))
    bca_deploy.open(path, backend="rtx").close()
    assert sorted(path.rglob("*")) == before


def test_a_closed_session_says_so_and_frees_its_memory(path: Path, gpu: Machine) -> None:
    session = bca_deploy.open(path, backend="rtx")
    session(**make(1, 2, 3))
    assert len(gpu.gpu.live) == 7
    session.close()
    assert len(gpu.gpu.live) == 0
    with pytest.raises(BcaError, match="the session is closed; open the bundle again"):
        session(**make(1, 2, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"contexts": 0}, "^contexts is 0; it must be at least 1$"),
        ({"cuda_graphs": -1}, "^cuda_graphs is -1; it must be at least 0$"),
        ({"threads": 0}, "^threads is 0; it must be at least 1 and at most 1024, or None for every core$"),
    ],
)
def test_numbers_out_of_range_are_refused(path: Path, options: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        bca_deploy.open(path, **options)
