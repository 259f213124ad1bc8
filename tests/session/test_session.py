"""The session: the reference layer's results from any thread, any kind of array, any backend that is there."""

import asyncio
import itertools
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.layers import make_checkpoint
from support.processes import HEAVY, run_without
from support.requests import bca, make, truth
from support.rounding import assert_same, is_same
from support.servers import PATIENCE_S

import bca_deploy
from bca_deploy.bundle.manifest import WEIGHTS_FILE
from bca_deploy.bundle.read import Bundle
from bca_deploy.errors import BcaError, BundleError, EngineError, InputError, ParityError
from bca_deploy.layers.checkpoint import Checkpoint
from bca_deploy.layers.stored.weight_files import read
from bca_deploy.session.session import Session


@pytest.fixture(scope="module")
def session(exported: Bundle) -> Any:
    with bca_deploy.open(exported.directory) as opened:
        yield opened


@pytest.fixture(scope="module")
def layer(exported: Bundle) -> torch.nn.Module:
    torch.set_num_threads(1)
    return Checkpoint(exported.manifest.layer, read(exported.path(WEIGHTS_FILE))).module(torch.float64)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 8), st.integers(1, 40), st.integers(1, 40), st.integers(0, 9), st.booleans())
def test_the_session_computes_the_reference_layer(
    session: Session, layer: torch.nn.Module, batch: int, x_len: int, context_len: int, seed: int, masked: bool
) -> None:
    inputs = make(batch, x_len, context_len, seed, masked)
    for got, wanted in zip(session(**inputs), truth(layer, inputs), strict=True):
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, wanted, atol=2e-5)


def test_by_position_by_name_and_by_mapping_are_the_same(session: Session) -> None:
    inputs = make(2, 5, 3)
    by_name, by_place = session(**inputs), session(*inputs.values())
    by_mapping = session.run(inputs)
    assert list(by_mapping) == ["out", "context_out"]
    assert_same(by_place, by_name)
    assert_same(by_mapping.values(), by_name)


def test_masks_left_out_are_all_true(session: Session) -> None:
    inputs = make(2, 5, 3, masked=False)
    full = inputs | {"mask": np.ones((2, 5), bool), "context_mask": np.ones((2, 3), bool)}
    assert_same(session(**inputs), session(**full))


@pytest.mark.parametrize("kind", [bool, np.float32, np.float64, np.int64])
@pytest.mark.parametrize("shapes", [((1, 1), (1, 1)), ((1, 5), (3, 1)), ((3, 1), (1, 4)), ((3, 5), (1, 4))], ids=str)
def test_masks_are_spread_as_the_layer_spreads_them(
    session: Session, layer: torch.nn.Module, shapes: tuple[tuple[int, int], ...], kind: Any
) -> None:
    inputs = make(3, 5, 4, masked=False)
    for name, shape in zip(("mask", "context_mask"), shapes, strict=True):
        inputs[name] = np.arange(shape[0] * shape[1]).reshape(shape) % 3 != 1
    with torch.no_grad():
        double = {n: torch.from_numpy(a) if a.dtype == bool else torch.from_numpy(a).double() for n, a in inputs.items()}
        wanted = [output.numpy() for output in layer(**double)]
    given_ = {n: a.astype(kind) if a.dtype == bool else a for n, a in inputs.items()}
    for _ in range(2):  # shapes that were taken once are not taken for whole ones
        for found, true in zip(session(**given_, cast=True), wanted, strict=True):
            np.testing.assert_allclose(found, true, atol=1e-5)
    assert_same(session.run_many([tuple(inputs.values())] * 2)[1], session(**inputs))


def test_what_this_export_left_out_is_told_with_the_option_of_the_export(session: Session) -> None:
    inputs = make(1, 2, 2)
    with pytest.raises(InputError, match=r"'rel_pos_bias'; .*; this export left it out: bca-export --rel-pos-bias$"):
        session(**inputs, rel_pos_bias=np.zeros((3, 2, 2), np.float32))
    with pytest.raises(InputError, match=r"'return_attn'; .*; this export left it out: bca-export --\[no-\]attention-maps$"):
        session(**inputs, return_attn=True)
    with pytest.raises(InputError, match=r"; this export left it out: bca-export --\[no-\]attention-maps$"):
        session.run_into(inputs, {name: np.empty((1, 2, 24), np.float32) for name in ("out", "attn")})


def test_torch_in_torch_out_and_numpy_in_numpy_out(session: Session) -> None:
    inputs = make(2, 5, 3)
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
    out, context_out = session(**tensors)
    assert isinstance(out, torch.Tensor)
    assert isinstance(context_out, torch.Tensor)
    assert is_same(out, session(**inputs)[0])


def test_inputs_that_track_gradients_are_taken_without_them(session: Session) -> None:
    inputs = {name: torch.from_numpy(array) for name, array in make(1, 4, 4).items()}
    inputs["x"].requires_grad_(True)
    assert not session(**inputs)[0].requires_grad


def test_bfloat16_of_torch_comes_in_and_goes_out_bit_by_bit(session: Session) -> None:
    from bca_deploy.session.arrays import as_array, back

    x = torch.randn(1, 3, 24).bfloat16()
    array = as_array("x", x)
    assert array.dtype.name == "bfloat16"
    returned = back([x])
    assert returned is not None
    assert torch.equal(returned(array), x)
    context = torch.randn(1, 2, 16)
    assert_same(session(x, context, cast=True), session(x.float(), context))


class Foreign:
    """An array that speaks DLPack and nothing else."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()


def test_any_dlpack_array_is_taken_without_a_copy(session: Session) -> None:
    from bca_deploy.session.arrays import as_array

    inputs = make(2, 5, 3, masked=False)
    foreign = Foreign(inputs["x"])
    assert np.shares_memory(as_array("x", foreign), inputs["x"])
    assert_same(session(foreign, inputs["context"]), session(**inputs))


def test_views_that_are_not_contiguous_give_the_same(session: Session) -> None:
    inputs = make(2, 5, 3)
    turned = {n: np.asfortranarray(a) for n, a in inputs.items()}
    assert_same(session(**turned), session(**inputs))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([[1.0]], "input x is a list; give a numpy array, a torch tensor or another array with __dlpack__"),
        (torch.ones(1, 2, 24, device="meta"), r"input x is on meta, where this session does not run; give x.cpu\(\)"),
        (torch.ones(1, 2, 24, dtype=torch.bfloat16), "^input x has dtype bfloat16, and needs float32; cast=True converts it$"),
        (torch.ones(1, 2, 24, dtype=torch.float8_e5m2), r"dtype torch.float8_e5m2, which numpy has not; give x.float\(\)"),
        (np.ones((1, 4096, 24), np.float32), r"axis 1 \(x_len\) is 4096, allowed 1 to 2048; a sequence cannot be cut"),
    ],
)
def test_what_a_session_cannot_take_is_refused(session: Session, value: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        session(value, np.ones((1, 2, 16), np.float32))


def test_run_into_writes_into_the_callers_arrays(session: Session) -> None:
    inputs = make(2, 5, 3)
    outputs = {"out": np.full((2, 5, 24), np.nan, np.float32), "context_out": np.full((2, 3, 16), np.nan, np.float32)}
    session.run_into(inputs, outputs)
    assert_same(outputs.values(), session(**inputs))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out": np.zeros((2, 5, 23), np.float32)}, r"output out is \[2, 5, 23\] float32; a writable, C-contiguous array of"),
        ({"out": np.zeros((2, 5, 24), np.float64)}, r"array of \[2, 5, 24\] float32 is needed"),
        ({"out": np.zeros((24, 5, 2), np.float32).T}, "C-contiguous"),
        ({"attn": np.zeros(1)}, "outputs out, context_out, attn were given, and the model has out, context_out"),
    ],
)
def test_run_into_refuses_arrays_that_do_not_fit(session: Session, change: dict[str, np.ndarray], message: str) -> None:
    outputs = {"out": np.zeros((2, 5, 24), np.float32), "context_out": np.zeros((2, 3, 16), np.float32)}
    with pytest.raises(InputError, match=message):
        session.run_into(make(2, 5, 3), outputs | change)


def test_run_into_refuses_outputs_that_overlap_anything(session: Session) -> None:
    inputs = make(2, 5, 5)
    memory = np.zeros(2 * 5 * (24 + 16) + 1, np.float32)

    def refusal(out: Any, context_out: Any, **change: Any) -> str:
        with pytest.raises(InputError) as error:
            session.run_into(inputs | change, {"out": out, "context_out": context_out})
        return str(error.value)

    out, context_out = memory[:240].reshape(2, 5, 24), memory[240:400].reshape(2, 5, 16)
    advice = " in memory; give each output memory of its own"
    assert refusal(inputs["x"], context_out) == "output out overlaps input x" + advice
    assert refusal(out, inputs["context"]) == "output context_out overlaps input context" + advice
    assert refusal(out, memory[239:399].reshape(2, 5, 16)) == "output context_out overlaps output out" + advice
    # A part, another dtype, another library's view of the same memory.
    assert refusal(out, context_out, x=memory[100:340].reshape(2, 5, 24)) == "output out overlaps input x" + advice
    mask = out.view(np.bool_).reshape(-1)[-10:].reshape(2, 5)
    assert refusal(out, context_out, mask=mask) == "output out overlaps input mask" + advice
    assert refusal(torch.from_numpy(inputs["x"]), context_out) == "output out overlaps input x" + advice
    assert (
        refusal(out, context_out, context=torch.from_numpy(context_out)) == "output context_out overlaps input context" + advice
    )


def test_run_into_takes_arrays_side_by_side_and_what_is_copied_first(session: Session) -> None:
    inputs, memory = make(2, 5, 5), np.zeros(2 * 5 * (24 + 16), np.float32)
    out, context_out = memory[:240].reshape(2, 5, 24), memory[240:].reshape(2, 5, 16)
    wanted = session(**inputs)
    session.run_into(inputs, {"out": out, "context_out": context_out})
    np.testing.assert_allclose(out, wanted[0], atol=1e-6)
    wide = np.zeros((2, 5, 48), np.float32)
    wide[..., ::2] = inputs["x"]
    into = wide.reshape(-1)[:240].reshape(2, 5, 24)
    session.run_into(inputs | {"x": wide[..., ::2]}, {"out": into, "context_out": context_out})
    np.testing.assert_allclose(into, wanted[0], atol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("kind", [lambda mask: mask, torch.from_numpy, Foreign], ids=["numpy", "torch", "dlpack"])
def test_a_mask_of_other_bytes_than_0_and_1_is_refused(exported: Bundle, precision: Any, kind: Any) -> None:
    inputs = make(2, 5, 3)
    mask = (inputs["mask"].astype(np.uint8) * 255).view(bool)
    with bca_deploy.open(exported.directory, precision=precision) as session:
        given = inputs | {"mask": kind(mask)}
        for call in (lambda: session(**given), lambda: session.run_many([tuple(given.values())])):
            with pytest.raises(InputError, match="input mask: a bool is one byte of 0 or 1, and here is one of 255"):
                call()


def test_sixteen_threads_of_different_shapes_never_mix_results(session: Session) -> None:
    requests = [make(1 + n % 3, 3 + n, 20 - n, seed=n) for n in range(16)]
    wanted = [session(**inputs) for inputs in requests]
    barrier = threading.Barrier(16)

    def work(index: int) -> None:
        barrier.wait()
        for _ in range(30):
            assert_same(session(**requests[index]), wanted[index])

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(work, range(16)))


def test_prepared_requests_run_together_as_each_would_alone(session: Session) -> None:
    given = [make(1, 7, 5, seed=1), make(2, 3, 4, seed=2, masked=False)]
    ready = [session.prepare(inputs) for inputs in given]
    assert [set(one) for one in ready] == [{tensor.name for tensor in session.inputs}] * 2
    assert ready[0]["x"] is given[0]["x"], "what fits is not copied"
    for found, inputs in zip(session.run_prepared(ready), given, strict=True):
        assert_same(found.values(), session.run(inputs).values())
    assert session.run_prepared([]) == []


def test_what_is_wrong_is_said_when_a_request_is_prepared(session: Session) -> None:
    with pytest.raises(InputError, match=r"^input context is missing"):
        session.prepare({"x": make(1, 7, 5)["x"]})
    with pytest.raises(InputError, match=r"^policy 'together' is not known"):
        session.run_prepared([], policy="together")  # type: ignore[arg-type]


def test_async_calls_run_side_by_side_and_come_back_in_order(session: Session) -> None:
    requests = [make(1, 3 + n, 4) for n in range(8)]

    async def all_of_them() -> list[tuple[Any, ...]]:
        return await asyncio.gather(*(session.run_async(**inputs) for inputs in requests))

    for got, inputs in zip(asyncio.run(all_of_them()), requests, strict=True):
        assert_same(got, session(**inputs))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(1, 2), st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=12), st.booleans())
@pytest.mark.parametrize("policy", ["alone", "pad"])
def test_run_many_equals_one_by_one_on_every_live_row(
    session: Session, policy: Any, shapes: list[tuple[int, int, int]], masked: bool
) -> None:
    requests = [make(*shape, seed=n, masked=masked) for n, shape in enumerate(shapes)]
    for got, inputs in zip(session.run_many([tuple(r.values()) for r in requests], policy=policy), requests, strict=True):
        live = inputs.get("mask", np.ones(inputs["x"].shape[:2], bool))
        context_live = inputs.get("context_mask", np.ones(inputs["context"].shape[:2], bool))
        rows = (live & context_live.any(1, keepdims=True), context_live & live.any(1, keepdims=True))
        for a, b, keep in zip(got, session(**inputs), rows, strict=True):
            assert a.shape == b.shape
            np.testing.assert_allclose(a[keep], b[keep], atol=2e-6)


@pytest.mark.parametrize("policy", ["alone", "pad"])
def test_run_many_of_nothing_is_nothing(session: Session, policy: Any) -> None:
    assert session.run_many([], policy=policy) == []


def test_run_many_names_the_pair_that_does_not_fit(session: Session) -> None:
    good = tuple(make(1, 2, 3).values())
    with pytest.raises(InputError, match=r"pair 1: input x: axis 2 is 5, and must be 24"):
        session.run_many([good, (np.ones((1, 2, 5), np.float32), good[1])])


def test_run_many_counts_its_padding(exported: Bundle) -> None:
    with bca_deploy.open(exported.directory) as session:
        session.run_many([tuple(make(1, n, 8, masked=False).values()) for n in (7, 8)], policy="pad")
        found = session.metrics()
    assert (found.calls, found.pairs, found.rows, found.padded_rows) == (1, 2, 32, 1)
    assert sum(found.histogram) == 1


def test_padding_without_masks_is_refused(tmp_path: Path) -> None:
    module = make_checkpoint(prenorm=True).module(torch.float32)
    bca_deploy.export(module, tmp_path / "m", inputs={"mask": False, "context_mask": False}).close()
    pairs = [(np.ones((1, n, 24), np.float32), np.ones((1, 3, 16), np.float32)) for n in (2, 3)]
    with bca_deploy.open(tmp_path / "m") as session:
        assert len(session.run_many(pairs)) == 2
        with pytest.raises(InputError, match="cannot be padded without masks; export with both masks, or policy='alone'"):
            session.run_many(pairs, policy="pad")


def test_failures_are_counted_and_the_next_call_works(exported: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    with bca_deploy.open(exported.directory) as session:
        with monkeypatch.context() as patch:
            patch.setattr(session._backend, "run", lambda inputs: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                session(**make(1, 2, 3))
        session(**make(1, 2, 3))
        assert (session.metrics().calls, session.metrics().failures) == (2, 1)


def test_closing_finishes_what_was_accepted_and_calls_under_way_end_well(exported: Bundle) -> None:
    session = bca_deploy.open(exported.directory, threads=1)
    run, inputs, entered, go = session._backend.run, make(1, 3, 4), threading.Event(), threading.Event()

    def slowly(given: Any) -> Any:
        entered.set()
        go.wait(PATIENCE_S)
        return run(given)

    session._backend.run = slowly  # type: ignore[method-assign]

    async def many() -> list[Any]:
        calls = [asyncio.ensure_future(session.run_async(**inputs)) for _ in range(5)]
        await asyncio.to_thread(entered.wait, PATIENCE_S)
        closing = asyncio.create_task(asyncio.to_thread(session.close))
        while not session._closed:
            await asyncio.sleep(0.001)
        go.set()
        await closing
        return await asyncio.gather(*calls)

    found = asyncio.run(many())
    with bca_deploy.open(exported.directory) as other:
        wanted = other(**inputs)
    for outputs in found:
        assert_same(outputs, wanted)


@pytest.mark.parametrize("method", ["run", "run_alone"])
def test_a_call_that_reaches_a_closed_backend_says_so(exported: Bundle, method: str) -> None:
    session = bca_deploy.open(exported.directory)
    backend, inputs = session._backend, make(1, 3, 4)
    session.close()
    with pytest.raises(BcaError, match=r"^the session is closed; open the bundle again$"):
        getattr(backend, method)(inputs)
    assert backend._alone is None  # type: ignore[attr-defined]  # and opens nothing


def test_many_threads_calling_while_the_session_closes_get_results_or_that_it_is_closed(exported: Bundle) -> None:
    wanted, refused = None, list[str]()
    for _ in range(5):
        session, begin = bca_deploy.open(exported.directory, threads=1), threading.Barrier(9)

        def work(index: int, session: Session = session, begin: threading.Barrier = begin) -> Any:
            begin.wait()
            found = None
            for _ in range(50):
                try:
                    found = session(**make(1, 3, 4))
                except BcaError as error:
                    refused.append(str(error))
                    break
            return found

        with ThreadPoolExecutor(8) as pool:
            calls = [pool.submit(work, index) for index in range(8)]
            begin.wait()
            session.close()
            for found in (call.result() for call in calls):
                wanted = found if wanted is None else wanted
                assert found is None or is_same(found[0], wanted[0])
    assert set(refused) <= {"the session is closed; open the bundle again"}


def test_what_onnxruntime_raises_is_one_of_our_errors_and_names_the_shapes(exported: Bundle) -> None:
    with bca_deploy.open(exported.directory) as session:
        inputs = make(1, 3, 4)
        del inputs["mask"]
        with pytest.raises(
            EngineError, match=r"^onnxruntime failed on x \[1, 3, 24\], context \[1, 4, 16\], context_mask \[1, 4\]: "
        ):
            session._backend.run(inputs)


@pytest.mark.parametrize(("threads", "wanted", "spinning"), [(1, 1, True), (3, 3, False), (None, 0, True)])
def test_threads_and_spinning_reach_onnxruntime(
    exported: Bundle, monkeypatch: pytest.MonkeyPatch, threads: int | None, wanted: int, spinning: bool
) -> None:
    import onnxruntime

    seen, real = [], onnxruntime.InferenceSession

    def spy(path: str, options: Any, **rest: Any) -> Any:
        spins = options.get_session_config_entry("session.intra_op.allow_spinning")
        seen.append((options.intra_op_num_threads, spins))
        return real(path, options, **rest)

    monkeypatch.setattr(onnxruntime, "InferenceSession", spy)
    with bca_deploy.open(exported.directory, threads=threads, spinning=spinning) as session:
        session.run_many([tuple(make(1, 3, 4, seed).values()) for seed in range(4)])
    assert seen == [(wanted, str(int(spinning))), (1, str(int(spinning)))]


def test_an_oversized_request_is_refused_before_anything_is_made_of_it(session: Session) -> None:
    context = make(1, 2, 3)["context"]
    for cast in (False, True):
        with pytest.raises(InputError, match=r"^input x: axis 1 \(x_len\) is 100000000000, allowed 1 to 2048"):
            session(np.broadcast_to(np.float64(0), (1, 10**11, 24)), context, cast=cast)


def test_an_unknown_policy_is_refused(session: Session) -> None:
    with pytest.raises(InputError, match=r"^policy 'Pad' is not known \(did you mean 'pad'\?\); allowed: auto, alone, pad$"):
        session.run_many([], policy="Pad")  # type: ignore[arg-type]


def test_pairs_may_come_from_generators_and_torch_goes_out_again(session: Session) -> None:
    inputs = [torch.from_numpy(array) for array in make(1, 3, 4).values()]
    ((out, _),) = session.run_many(iter([iter(inputs)]))
    assert is_same(out, session(*inputs)[0])


def test_run_many_takes_one_thread_where_another_has_taken_the_rest(exported: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs, entered, gate = [tuple(make(1, 3, 4).values())], threading.Event(), threading.Event()
    with bca_deploy.open(exported.directory, threads=2) as session, ThreadPoolExecutor(1) as pool:
        run, run_alone, how = session._backend.run, session._backend.run_alone, list[str]()

        def on_all(inputs: Any) -> Any:
            how.append("all")
            entered.set()
            assert gate.wait(PATIENCE_S)
            return run(inputs)

        def on_one(inputs: Any) -> Any:
            how.append("one")
            return run_alone(inputs)

        monkeypatch.setattr(session._backend, "run", on_all)
        monkeypatch.setattr(session._backend, "run_alone", on_one)
        first = pool.submit(session.run_many, pairs)
        assert entered.wait(PATIENCE_S)
        session.run_many(pairs)
        gate.set()
        first.result()
        session.run_many(pairs)
        assert how == ["all", "one", "all"]


def test_run_many_does_not_wait_behind_what_it_did_not_need(exported: Bundle) -> None:
    with bca_deploy.open(exported.directory, threads=2) as session:
        free = threading.Event()
        taken = [session._executor().submit(free.wait, PATIENCE_S) for _ in range(2)]
        try:
            pairs = [tuple(make(1, 3, 4, seed).values()) for seed in range(6)]
            assert len(session.run_many(pairs)) == 6  # both threads are taken, so the caller does it all
            assert not any(future.done() for future in taken)
        finally:
            free.set()


def test_the_callers_context_is_there_in_the_background(exported: Bundle) -> None:
    import contextvars

    request = contextvars.ContextVar("request", default="lost")
    told: list[str] = []
    with bca_deploy.open(exported.directory, on_call=lambda call: told.append(request.get()), threads=2) as session:
        request.set("mine")
        asyncio.run(session.run_async(**make(1, 3, 4)))
        session.run_many([tuple(make(1, 3, 4, seed).values()) for seed in range(40)])
    assert set(told) == {"mine"}
    assert len(told) == 41


def test_a_closed_session_says_so(exported: Bundle) -> None:
    session = bca_deploy.open(exported.directory)
    session.close()
    for call in (lambda: session(**make(1, 2, 3)), lambda: session.run_many([tuple(make(1, 2, 3).values())])):
        with pytest.raises(BcaError, match="the session is closed; open the bundle again"):
            call()


def test_auto_takes_the_graph_made_for_the_cpu_and_says_why_nothing_faster(session: Session) -> None:
    explanation = session.explain()
    assert explanation.chosen.startswith("onnxruntime-cpu: models/fp32.onnxruntime-cpu.onnx on onnxruntime")
    assert [name for name, _ in explanation.passed_over] == ["tensorrt", "rtx", "onnxruntime-cuda", "onnxruntime-tensorrt"]
    assert "no tensorrt engine; build one: bca build" in str(explanation)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"backend": "cpu"}, InputError, "backend 'cpu' is not known"),
        ({"backend": "rtx"}, EngineError, "no rtx engine; build one: bca build"),
        ({"backend": "onnxruntime-cuda"}, EngineError, "no CUDA provider|no GPU"),
        (
            {"backend": "onnxruntime-cpu", "precision": "bf16"},
            InputError,
            "no bfloat16 products on the CPU; open with precision",
        ),
        ({"threads": 0}, InputError, "threads is 0; it must be at least 1"),
    ],
)
def test_an_explicit_request_never_falls_back(
    exported: Bundle, options: dict[str, Any], error: type[BcaError], message: str
) -> None:
    with pytest.raises(error, match=message):
        bca_deploy.open(exported.directory, **options)


def test_the_precision_asked_for_is_the_one_that_runs(exported: Bundle) -> None:
    with bca_deploy.open(exported.directory, precision="fp16") as session:
        assert "models/fp16.onnx" in session.explain().chosen
        session.selftest()


def test_the_self_test_passes_and_a_wrong_model_fails_it(exported: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    with bca_deploy.open(exported.directory) as session:
        session.selftest()
        run = session._backend.run
        monkeypatch.setattr(session._backend, "run", lambda inputs: {n: a * 1.01 for n, a in run(inputs).items()})
        with pytest.raises(ParityError, match="self-test fp32/"):
            session.selftest()


def test_a_changed_file_is_refused_unless_checks_are_off(exported: Bundle, tmp_path: Path) -> None:
    import shutil

    copy = shutil.copytree(exported.directory, tmp_path / "m")
    with (copy / "parity.json").open("r+b") as file:
        file.write(b"X")
    with pytest.raises(BundleError, match=r"parity.json has changed since the export"):
        bca_deploy.open(copy)
    bca_deploy.open(copy, verify="size").close()


def test_opening_and_running_needs_neither_torch_nor_onnx(exported: Bundle) -> None:
    script = """
import numpy as np
import bca_deploy
with bca_deploy.open(sys.argv[1]) as session:
    out, _ = session(np.ones((1, 3, 24), np.float32), np.ones((1, 2, 16), np.float32))
    session.selftest()
print(out.shape, [name for name in ("torch", "onnx") if name in sys.modules])
"""
    assert run_without(tuple(n for n in HEAVY if n != "onnxruntime"), script, exported.directory).stdout == "(1, 3, 24) []\n"


def test_opening_and_running_say_nothing_where_the_home_directory_cannot_be_written(exported: Bundle) -> None:
    script = f"import bca_deploy; bca_deploy.open({str(exported.directory)!r}).selftest()"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "ORT_"))}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment | {"HOME": "/proc/nowhere"})
    assert (done.stdout, done.stderr) == ("", "")


def test_thousands_of_calls_need_no_more_memory_than_one_thousand(exported: Bundle) -> None:
    script = """
import sys, numpy as np, bca_deploy
def rss(): return int(open("/proc/self/statm").read().split()[1]) * 4096
with bca_deploy.open(sys.argv[1]) as session:
    requests = [(np.ones((1, n, 24), np.float32), np.ones((1, 40 - n, 16), np.float32)) for n in range(1, 33)]
    for index in range(10_000):
        session(*requests[index % 32])
        if index % 1000 == 999: print(rss())
"""
    done = subprocess.run([sys.executable, "-c", script, exported.directory], capture_output=True, text=True, check=True)
    sizes = [int(line) for line in done.stdout.split()]
    # The allocator and the kernel, with huge pages, take more now and then; calls that keep something take more each time.
    assert min(after - before for before, after in itertools.pairwise(sizes)) <= 0


def test_bca_run_reads_npy_and_npz_and_writes_the_outputs(exported: Bundle, session: Session, tmp_path: Path) -> None:
    inputs = make(2, 5, 3)
    np.save(tmp_path / "x.npy", inputs["x"])
    np.savez(tmp_path / "rest.npz", **{n: a for n, a in inputs.items() if n != "x"})
    out = tmp_path / "out.npz"
    arguments = (
        "run",
        exported.directory,
        "--input",
        f"x={tmp_path / 'x.npy'}",
        "--input",
        tmp_path / "rest.npz",
        "--output",
        out,
    )
    done = bca(*arguments, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["outputs"]["out"] == {"shape": [2, 5, 24], "dtype": "float32"}
    with np.load(out) as arrays:
        assert is_same(arrays["out"], session(**inputs)[0])
    again = bca(*arguments)
    assert again.exit_code == 2
    assert "exists; use --force to replace it" in again.stderr
    assert bca(*arguments, "--force").exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.npz", "rest.npz", "x.npy"]


def test_bca_run_selftest(exported: Bundle) -> None:
    done = bca("run", exported.directory, "--selftest")
    assert done.exit_code == 0, done.output
    assert "self-test passed" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give either --selftest, or --input"),
        (("--input", "x=absent.npy"), "absent.npy does not exist or is not a file"),
        (("--selftest", "--backend", "rtx"), "has no rtx engine"),
    ],
)
def test_bca_run_refuses_with_exit_code_2(exported: Bundle, arguments: tuple[str, ...], message: str) -> None:
    done = bca("run", exported.directory, *arguments)
    assert done.exit_code == 2
    assert message in done.stderr


def test_bca_run_refuses_a_damaged_archive_of_arrays(exported: Bundle, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", **make(1, 2, 3))
    whole = (tmp_path / "x.npz").read_bytes()
    (tmp_path / "x.npz").write_bytes(whole[: len(whole) // 2])
    done = bca("run", exported.directory, "--input", tmp_path / "x.npz")
    assert done.exit_code == 2
    assert "x.npz is not a readable .npz or .npy of plain arrays" in done.stderr


def test_where_one_of_many_fails_the_call_fails_and_the_next_works(exported: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [tuple(make(1, 4, 4, seed=n).values()) for n in range(12)]
    with bca_deploy.open(exported.directory, threads=2) as session:
        run, calls = session._backend.run_alone, iter(range(100))

        def fifth_fails(inputs: Any) -> Any:
            if next(calls) == 5:
                raise RuntimeError("the fifth")
            return run(inputs)

        with monkeypatch.context() as patch:
            patch.setattr(session._backend, "run_alone", fifth_fails)
            with pytest.raises(RuntimeError, match="the fifth"):
                session.run_many(pairs)
        assert len(session.run_many(pairs)) == 12


def test_spans_of_opentelemetry_are_made_of_what_an_observer_is_told(exported: Bundle) -> None:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from bca_deploy.session.metrics import Call

    kept, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(kept))
    tracer = provider.get_tracer("server")

    def span(call: Call) -> None:
        made = tracer.start_span(
            "bca", start_time=call.start_ns, attributes={"backend": call.backend, "batch": call.sizes["batch"]}
        )
        made.end(call.end_ns)

    with bca_deploy.open(exported.directory, on_call=span) as session:
        with tracer.start_as_current_span("request"):
            session(**make(2, 3, 4))
        session.run_many([tuple(make(1, 3, 4).values())] * 3)
    inner, request, *many = kept.get_finished_spans()
    assert inner.parent is not None
    assert inner.parent.span_id == request.context.span_id
    assert inner.attributes == {"backend": "onnxruntime-cpu", "batch": 2}
    assert request.start_time <= inner.start_time <= inner.end_time <= request.end_time
    assert len(many) == 3


def test_opening_logs_one_line_with_its_parts_and_calls_log_nothing(exported: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG", "bca_deploy"), bca_deploy.open(exported.directory) as session:
        session(**make(1, 2, 3))
        session.run_many([tuple(make(1, 2, 3).values())] * 3)
    (record,) = caplog.records
    assert "not tensorrt: " in record.getMessage()
    assert (record.backend, record.precision) == ("onnxruntime-cpu", "fp32")  # type: ignore[attr-defined]


def test_an_observers_mistake_fails_no_request(exported: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    with bca_deploy.open(exported.directory, on_call=lambda call: 1 / 0) as session:
        assert len(session(**make(1, 2, 3))) == 2
    assert "on_call failed" in caplog.text


def test_an_observer_is_told_of_failures(exported: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    with bca_deploy.open(exported.directory, on_call=told.append) as session:
        monkeypatch.setattr(session._backend, "run", lambda inputs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            session(**make(1, 2, 3))
    assert [(call.failed, call.sizes) for call in told] == [(True, {"batch": 1, "x_len": 2, "context_len": 3})]


def test_shapes_that_were_accepted_are_still_checked_for_everything_else(session: Session) -> None:
    inputs = make(2, 5, 3)
    session(**inputs)
    with pytest.raises(InputError, match="has dtype float64"):
        session(**inputs | {"x": inputs["x"].astype(np.float64)})
    with pytest.raises(InputError, match="must agree"):
        session(**inputs | {"mask": np.ones((2, 4), bool)})


def test_a_prometheus_registry_reads_the_metrics(exported: Bundle) -> None:
    from prometheus_client import CollectorRegistry, generate_latest

    from bca_deploy.session.metrics import prometheus_collector

    with bca_deploy.open(exported.directory) as session:
        registry = CollectorRegistry()
        registry.register(prometheus_collector(session, {"model": "m"}))
        session(**make(2, 3, 4))
        session(**make(1, 3, 4))
        text = generate_latest(registry).decode()
    assert 'bca_session_calls_total{model="m"} 2.0' in text
    assert 'bca_session_pairs_total{model="m"} 3.0' in text
    assert 'bca_session_rows_total{model="m"} 21.0' in text
    assert 'bca_session_seconds_bucket{le="+Inf",model="m"} 2.0' in text
