"""The C++ runtime: built here, run by its own tests, and held against the Python session."""

import ctypes
import io
import json
import os
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from support import native
from support.held_server import Held
from support.native import passed
from support.rounding import is_same
from support.servers import PATIENCE_S, until

import bca_deploy
from bca_deploy.bundle.read import Bundle
from bca_deploy.bundle.trust import Trust, said
from bca_deploy.errors import InputError

pytestmark = pytest.mark.slow

LACKING = native.missing("library")
needs_clang = pytest.mark.skipif(bool(native.missing("clang")), reason="no clang++; install Debian's clang and libclang-rt-dev")
PATIENT_MS = f"{PATIENCE_S * 1e3:.0f}"
FIXTURE = native.ROOT / "tests" / "fixtures" / "format1"
README = (native.ROOT / "runtime" / "README.md").read_text(encoding="utf-8")
SESSION_PAGE = (native.ROOT / "docs" / "session.md").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def release() -> Path:
    if LACKING:
        pytest.skip(f"runtime/ is not built without {', '.join(LACKING)}; make setup as root installs it, or says the command")
    return native.build("release")


@pytest.fixture(scope="session")
def bca_run(release: Path) -> Path:
    return release / "bca-run"


def test_where_the_setup_may_install_nothing_is_missing() -> None:
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        pytest.skip("the set-up step installs Debian's packages only as root")
    assert native.missing("library", "clang") == []


def snippets(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def inputs(batch: int, x_len: int, context_len: int, masked: bool = True, dims: tuple[int, int] = (24, 16)) -> dict[str, Any]:
    r = np.random.default_rng(batch * x_len + context_len)
    given: dict[str, Any] = {
        name: r.standard_normal((batch, length, dim), np.float32)
        for name, length, dim in (("x", x_len, dims[0]), ("context", context_len, dims[1]))
    }
    if masked:
        given |= {"mask": r.random((batch, x_len)) < 0.7, "context_mask": r.random((batch, context_len)) < 0.7}
    return given


def save(directory: Path, arrays: dict[str, np.ndarray]) -> list[str]:
    for name, array in arrays.items():
        np.save(directory / f"{name}.npy", array)
    return [word for name in arrays for word in ("--input", f"{name}={directory / name}.npy")]


# The library's own tests, as built for users and under sanitizers.


def test_every_googletest_passes_and_none_is_skipped(release: Path) -> None:
    shown = passed(["ctest", "--output-on-failure"], release)
    assert "100% tests passed" in shown
    listed = passed([release / "tests" / "bca_tests", "--gtest_list_tests"]).count("\n  ")
    ran = passed([release / "tests" / "bca_tests"])
    assert f"[  PASSED  ] {listed} tests." in ran
    assert listed > 130
    assert "SKIPPED" not in ran


def test_ctest_runs_every_suite(release: Path) -> None:
    suites = re.findall(
        r"^(?:\w+/)?(\w+)\.", passed([release / "tests" / "bca_tests", "--gtest_list_tests"]), flags=re.MULTILINE
    )
    filters = " ".join(re.findall(r"--gtest_filter=(\S+)\"?", passed(["ctest", "--show-only=json-v1"], release)))
    assert [suite for suite in suites if suite not in filters] == []


@needs_clang
def test_address_and_undefined_behaviour_sanitizers_find_nothing(release: Path) -> None:
    tests = native.build("address") / "tests" / "bca_tests"
    done, leaks = native.sanitized([tests], UBSAN_OPTIONS="print_stacktrace=1")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    assert "[  PASSED  ]" in done.stdout
    if not leaks:
        pytest.skip(NO_LEAK_CHECK)


NO_LEAK_CHECK = f"everything passed but the look for leaks, which does not work here: {native.LEAKS_UNKNOWN}"


def test_thread_sanitizer_finds_nothing_on_an_instrumented_onnxruntime_nor_on_the_real_one(release: Path) -> None:
    built = native.build("thread") / "tests"
    chosen = "--gtest_filter=Threads.*:EngineRunner*:*Refusal*:TensorRT.*-*AutoTakes*"
    done, _ = native.sanitized([built / "bca_tests", chosen], BCA_ORT_LIBRARY=str(built / "libfake_ort.so"))
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    assert "[  PASSED  ]" in done.stdout
    # The real one is not instrumented, so what happens inside it cannot be judged.
    real = {"TSAN_OPTIONS": "ignore_noninstrumented_modules=1"}
    done, _ = native.sanitized([built / "bca_tests", "--gtest_filter=Threads.*"], **real)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    assert "[  PASSED  ] 2 tests." in done.stdout


#: As many inputs on every machine, in whatever time it takes them.
RUNS = 100_000


@needs_clang
def test_fuzzing_finds_no_crash(release: Path, tmp_path: Path) -> None:
    built = native.build("address") / "tests"
    seeds = {"manifest": [FIXTURE / "manifest.json"], "npy": list(FIXTURE.glob("*.npz"))}

    def fuzz(target: str) -> bool:
        corpus = tmp_path / target
        corpus.mkdir()
        for seed in seeds[target]:
            shutil.copy(seed, corpus)
        done, leaks = native.sanitized([built / f"fuzz_{target}", f"-runs={RUNS}", "-rss_limit_mb=2048", corpus], tmp_path)
        assert done.returncode == 0, done.stderr[-4000:]
        assert f"Done {RUNS} runs in" in done.stderr
        return leaks

    with ThreadPoolExecutor() as pool:
        if not all(list(pool.map(fuzz, seeds))):
            pytest.skip(NO_LEAK_CHECK)


# The same as Python.


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("threads", [1, 2])
def test_outputs_are_the_python_sessions(bca_run: Path, exported: Bundle, tmp_path: Path, precision: Any, threads: int) -> None:
    with bca_deploy.open(exported.directory, "onnxruntime-cpu", precision=precision, threads=threads) as session:
        for number, (shape, masked) in enumerate(
            [((1, 1, 1), True), ((2, 7, 5), False), ((3, 40, 33), True), ((1, 64, 64), True)]
        ):
            given = inputs(*shape, masked)
            wanted = session.run(given, cast=True)
            here = tmp_path / str(number)
            here.mkdir()
            flags = [word for name in wanted for word in ("--output", f"{name}={here / name}-out.npy")]
            command: list[str | Path] = [bca_run, exported.directory, *save(here, given), *flags, "--cast"]
            passed([*command, "--precision", precision, "--threads", str(threads), "--backend", "onnxruntime-cpu"])
            for name, array in wanted.items():
                assert is_same(np.load(here / f"{name}-out.npy"), array, precision)


def test_the_same_binary_runs_on_an_older_onnxruntime(bca_run: Path, exported: Bundle) -> None:
    older = native.SDK / "older" / "libonnxruntime.so"
    if not older.exists():
        pytest.skip("no older onnxruntime; make setup fetches one on x86-64")
    command = [bca_run, exported.directory, "--selftest", "--backend", "onnxruntime-cpu", "--ort"]
    shown = [passed([*command, library]) for library in (older, native.ort_library())]
    assert all(line.startswith("self-test passed: onnxruntime-cpu: ") for line in shown)
    assert len({line.split()[-1] for line in shown}) == 2  # versions


def test_both_pick_the_same_model(bca_run: Path, exported: Bundle) -> None:
    described = json.loads(passed([bca_run, exported.directory, "--describe"]))
    with bca_deploy.open(exported.directory) as session:
        assert described["chosen"] == session.explain().chosen
        assert [t["name"] for t in described["inputs"]] == [t.name for t in session.inputs]
        passed_over = {name for name, _ in session.explain().passed_over}
        assert set(described["passed_over"]) == passed_over - {"onnxruntime-tensorrt"}  # Python's alone


def test_both_say_in_the_same_words_what_a_bundle_rests_on(bca_run: Path, exported: Bundle, tmp_path: Path) -> None:
    text = (exported.directory / "manifest.json").read_text(encoding="utf-8")
    assert '"trust": "live-module"' in text
    for trust in get_args(Trust):
        other = Path(shutil.copytree(exported.directory, tmp_path / trust))
        (other / "manifest.json").write_text(text.replace('"trust": "live-module"', f'"trust": "{trust}"'), encoding="utf-8")
        described = json.loads(passed([bca_run, other, "--describe"]))
        assert (described["trust"], described["trust_said"]) == (trust, said(trust))


def test_both_refuse_a_request_of_the_session_in_the_same_words(bca_run: Path, exported: Bundle, tmp_path: Path) -> None:
    given = inputs(1, 3000, 5)
    done = native.run([bca_run, exported.directory, *save(tmp_path, given)])
    with bca_deploy.open(exported.directory) as session, pytest.raises(InputError) as error:
        session.run(given)
    assert done.returncode == 2
    assert done.stderr == f"error: {error.value}\n"


# bca-run.


def test_the_selftest_passes_and_an_output_out_of_bounds_exits_1(bca_run: Path, tmp_path: Path) -> None:
    assert passed([bca_run, FIXTURE, "--selftest"]).startswith(
        "self-test passed: onnxruntime-cpu: models/fp32.onnx on onnxruntime "
    )
    broken = shutil.copytree(FIXTURE, tmp_path / "broken")
    with np.load(FIXTURE / "selftest.npz") as arrays:
        changed = {name: array * 0 if "/bound/" in name else array for name, array in arrays.items()}
    np.savez_compressed(broken / "selftest.npz", **changed)
    done = native.run([bca_run, broken, "--selftest", "--verify", "off"])
    assert done.returncode == 1
    assert re.match(r"error: self-test fp32/dead-rows: context_out is off by \S+, allowed 0; ", done.stderr)


def test_nothing_is_said_where_the_home_directory_cannot_be_written(bca_run: Path) -> None:
    done = native.run([bca_run, FIXTURE, "--selftest"], HOME="/proc/nowhere", XDG_CACHE_HOME="/proc/nowhere")
    assert (done.returncode, done.stderr) == (0, "")


def test_bench_prints_ordered_percentiles_as_json(bca_run: Path) -> None:
    shown = json.loads(passed([bca_run, FIXTURE, "--bench", "--repeat", "50", "--shape", "2x8x8"]))
    assert shown["runs"] == 50
    times = [shown[key] for key in ("min_ms", "p50_ms", "p90_ms", "p99_ms", "max_ms")]
    assert times == sorted(times)
    assert 0 < times[0] <= shown["mean_ms"] <= times[-1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to do: give --input, --bench, --selftest or --describe"),
        (["--wrong", "1"], "there is no option --wrong"),
        (["--repeat", "0"], "--repeat is '0'; it must be a whole number of at least 1"),
        (["--repeat"], "option --repeat is unknown or lacks its value"),
        (["--backend", "tensort"], "backend 'tensort' is not known (did you mean 'tensorrt'?)"),
        (["--input", "x.npy"], "--input is 'x.npy'; give NAME=FILE.npy"),
        (["--input", "x=nowhere.npy"], "nowhere.npy does not exist or cannot be read as a file"),
        (["--bench", "--shape", "1x2"], "shape 1x2: give 3 sizes, of batch, x_len, context_len"),
        (["--bench", "--shape", f"1x{10**12}x1"], "input x: axis 1 (x_len) is 1000000000000, allowed 1 to 16; "),
        (["--bench", "--shape", "-1x2x2"], "--shape is '-1x2x2'; give a size for each dimension, such as 1x512x512"),
        (["--selftest", "--output", "out=out.npy"], "--output is given, and nothing is run that it could come from; "),
        (["--selftest", "--backend", "onnxruntime-cpu", "--ort", "nowhere.so"], "onnxruntime does not load (nowhere.so: "),
    ],
)
def test_what_bca_run_cannot_do_exits_2_and_says_why(bca_run: Path, words: list[str], message: str) -> None:
    done = native.run([bca_run, FIXTURE, *words])
    assert done.returncode == 2
    assert f"error: {message}" in done.stderr


def test_an_output_goes_to_stdout_and_devices_stay_what_they_are(bca_run: Path, tmp_path: Path) -> None:
    given = save(tmp_path, inputs(1, 2, 3, dims=(8, 6)))
    command: list[str | Path] = [bca_run, FIXTURE, *given, "--output", "out=/dev/stdout", "--output", "context_out=/dev/null"]
    done = subprocess.run(command, env=native.environment(), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert np.load(io.BytesIO(done.stdout)).shape == (1, 2, 8)
    assert Path("/dev/null").is_char_device()
    assert Path("/dev/stdout").is_symlink()


# The C interface, from Python.


class Tensor(ctypes.Structure):
    _fields_ = (
        ("size", ctypes.c_size_t),
        ("name", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("rank", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("memory", ctypes.c_int32),
    )


class NewerTensor(Tensor):
    _fields_ = (("layout", ctypes.c_int64), ("reserved", ctypes.c_void_p))  # what a later version may add


class OpenOptions(ctypes.Structure):
    _fields_ = (
        ("size", ctypes.c_size_t),
        ("backend", ctypes.c_char_p),
        ("precision", ctypes.c_char_p),
        ("threads", ctypes.c_int32),
        ("verify", ctypes.c_int32),
        ("onnxruntime_library", ctypes.c_char_p),
    )  # an older caller's: shorter than the library's


class NewerOptions(OpenOptions):
    _fields_ = (
        ("tensorrt_library", ctypes.c_char_p),
        ("cuda_library", ctypes.c_char_p),
        ("device", ctypes.c_int32),
        ("contexts", ctypes.c_int32),
        ("host_code", ctypes.c_int32),
        ("no_spinning", ctypes.c_int64),
    )


DTYPES = {"float32": 0, "bool": 4}


def tensors(arrays: dict[str, np.ndarray], kind: type[Tensor] = Tensor) -> Any:
    """The arrays must outlive the result."""
    return (kind * len(arrays))(
        *(
            kind(
                ctypes.sizeof(kind),
                name.encode(),
                a.ctypes.data,
                (ctypes.c_int64 * a.ndim)(*a.shape),
                a.ndim,
                DTYPES[a.dtype.name],
                0,
            )
            for name, a in arrays.items()
        )
    )


@pytest.fixture(scope="module")
def library(release: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(release / "libbca_runtime.so"))
    loaded.bca_last_error.restype = loaded.bca_describe.restype = loaded.bca_version.restype = ctypes.c_char_p
    loaded.bca_describe.argtypes = loaded.bca_close.argtypes = loaded.bca_selftest.argtypes = [ctypes.c_void_p]
    loaded.bca_open.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p)]
    pointer = [ctypes.c_void_p, ctypes.c_size_t]
    loaded.bca_run.argtypes = [ctypes.c_void_p, *pointer, *pointer, ctypes.c_void_p]
    return loaded


@pytest.fixture
def opened(library: ctypes.CDLL, exported: Bundle) -> Iterator[ctypes.c_void_p]:
    session = ctypes.c_void_p()
    ort = str(native.ort_library()).encode()
    options = OpenOptions(ctypes.sizeof(OpenOptions), b"onnxruntime-cpu", b"fp32", 1, 0, ort)
    status = library.bca_open(str(exported.directory).encode(), ctypes.byref(options), ctypes.byref(session))
    assert status == 0, library.bca_last_error()
    yield session
    library.bca_close(session)


def test_ctypes_runs_a_bundle_through_the_c_interface(library: ctypes.CDLL, opened: ctypes.c_void_p, exported: Bundle) -> None:
    given = inputs(2, 7, 5)
    outputs = {"out": np.empty((2, 7, 24), np.float32), "context_out": np.empty((2, 5, 16), np.float32)}
    assert library.bca_run(opened, tensors(given), 4, tensors(outputs), 2, None) == 0, library.bca_last_error()
    with bca_deploy.open(exported.directory, threads=1) as session:
        wanted = session.run(given)
    assert all(is_same(outputs[name], wanted[name]) for name in outputs)
    assert library.bca_selftest(opened) == 0
    described = json.loads(library.bca_describe(opened))
    assert described["backend"] == "onnxruntime-cpu"
    assert described["dims"]["x_len"] == {"min": 1, "opt": 512, "max": 2048}
    assert library.bca_version() == b"0.1.0"


def test_tensors_of_a_newer_caller_are_longer_and_run(library: ctypes.CDLL, opened: ctypes.c_void_p, exported: Bundle) -> None:
    given = inputs(2, 7, 5)
    outputs = {"out": np.empty((2, 7, 24), np.float32), "context_out": np.empty((2, 5, 16), np.float32)}
    call = (tensors(given, NewerTensor), 4, tensors(outputs, NewerTensor), 2, None)
    assert library.bca_run(opened, *call) == 0, library.bca_last_error()
    with bca_deploy.open(exported.directory, threads=1) as session:
        assert all(is_same(array, outputs[name]) for name, array in session.run(given).items())


def test_an_older_caller_that_was_compiled_with_shorter_structures_runs(release: Path, tmp_path: Path) -> None:
    source, program = native.ROOT / "runtime" / "tests" / "older_caller.c", tmp_path / "older_caller"
    passed(["gcc", "-std=c99", "-Wall", "-Wextra", "-Werror", source, "-ldl", "-o", program])
    shown = passed([program, release / "libbca_runtime.so", FIXTURE])
    x, context = (np.arange(n * d, dtype=np.float32).reshape(1, n, d) / np.float32(n * d) for n, d in ((4, 8), (3, 6)))
    with bca_deploy.open(FIXTURE, "onnxruntime-cpu", threads=1) as session:
        out, context_out = session(x, context)
    assert np.allclose([float(word) for word in shown.split()], [out.flat[0], context_out.flat[0]], rtol=1e-5, atol=1e-6)


def test_tensors_whose_size_is_not_set_or_differs_are_refused(library: ctypes.CDLL, opened: ctypes.c_void_p) -> None:
    given = inputs(2, 7, 5)
    sent = tensors(given)
    # The last is what callers had in its place before there was a size: the address of the name.
    for size in (0, 7, 39, 5000, ctypes.cast(ctypes.c_char_p(b"x"), ctypes.c_void_p).value):
        sent[0].size = size
        assert library.bca_run(opened, sent, 4, None, 0, None) == 1
        assert library.bca_last_error() == b"a tensor's size is not set; set it to sizeof of the structure"
    sent = tensors(given)
    sent[1].size = 40
    assert library.bca_run(opened, sent, 4, None, 0, None) == 1
    assert library.bca_last_error() == b"the tensors of a list differ in size; set each to sizeof of the structure"


def test_numbers_that_bca_h_does_not_know_are_refused(library: ctypes.CDLL, opened: ctypes.c_void_p) -> None:
    given = inputs(2, 7, 5)
    for field, number, message in (
        ("dtype", 13, b"input x: its element type is 13; allowed: 0 float32, "),
        ("dtype", -1, b"input x: its element type is -1; allowed: 0 float32, "),
        ("memory", 2, b"input x: its memory is 2; allowed: 0 cpu, 1 cuda"),
        ("rank", -1, b"tensor x has no shape"),
    ):
        sent = tensors(given)
        setattr(sent[0], field, number)
        assert library.bca_run(opened, sent, 4, None, 0, None) == 1
        assert library.bca_last_error().startswith(message)


def test_the_c_interface_reports_each_kind_of_error(library: ctypes.CDLL, opened: ctypes.c_void_p, tmp_path: Path) -> None:
    session = ctypes.c_void_p()

    def open_error(path: Path, **options: Any) -> tuple[int, str]:
        given = OpenOptions(ctypes.sizeof(OpenOptions), **options)
        status = library.bca_open(str(path).encode(), ctypes.byref(given), ctypes.byref(session))
        return status, library.bca_last_error().decode()

    assert open_error(tmp_path)[0] == 2
    assert "is not a bundle" in open_error(tmp_path)[1]
    assert open_error(FIXTURE, backend=b"tensorrt")[0] == 3
    assert open_error(FIXTURE, onnxruntime_library=b"nowhere.so", backend=b"onnxruntime-cpu")[0] == 4
    assert open_error(FIXTURE, backend=b"cpu")[0] == 1
    assert open_error(FIXTURE, verify=9)[1] == "verify is 9; allowed: 0 full, 1 size, 2 off"
    assert (
        open_error(FIXTURE, threads=100_000)[1]
        == "threads is 100000; it must be at least 1 and at most 1024, or 0 for every core"
    )
    assert not session
    assert library.bca_open(None, None, ctypes.byref(session)) == 1
    assert library.bca_run(opened, None, 1, None, 0, None) == 1
    assert library.bca_last_error() == b"the list of tensors is null"
    assert library.bca_run(None, None, 0, None, 0, None) == 1
    given = inputs(2, 7, 5)
    assert library.bca_run(opened, tensors(given), 4, None, 0, None) == 1
    assert library.bca_last_error() == b"outputs  were given, and the model has out, context_out"
    options = OpenOptions(0)
    assert library.bca_open(str(FIXTURE).encode(), ctypes.byref(options), ctypes.byref(session)) == 1
    assert b"the options' size is not set" in library.bca_last_error()


def test_where_no_backend_works_auto_is_an_engine_error(library: ctypes.CDLL) -> None:
    session = ctypes.c_void_p()
    given = OpenOptions(ctypes.sizeof(OpenOptions), onnxruntime_library=b"nowhere.so")
    assert library.bca_open(str(FIXTURE).encode(), ctypes.byref(given), ctypes.byref(session)) == 3
    assert library.bca_last_error().startswith(b"nothing here runs this bundle: tensorrt: ")


def fake_ort_options(release: Path, log: Path, open_it: Callable[[bytes], Any]) -> str:
    """Return what a session that is opened meanwhile tells the double of onnxruntime, which writes it down."""
    os.environ["FAKE_ORT_LOG"] = str(log)
    try:
        open_it(str(release / "tests" / "libfake_ort.so").encode())
    finally:
        del os.environ["FAKE_ORT_LOG"]
    return log.read_text()


@pytest.mark.parametrize(("no_spinning", "told"), [(0, "1"), (1, "0")])
def test_the_c_options_say_whether_threads_spin(
    library: ctypes.CDLL, release: Path, tmp_path: Path, no_spinning: int, told: str
) -> None:
    def open_it(ort: bytes) -> None:
        session = ctypes.c_void_p()
        given = NewerOptions(ctypes.sizeof(NewerOptions), b"onnxruntime-cpu", onnxruntime_library=ort, no_spinning=no_spinning)
        assert library.bca_open(str(FIXTURE).encode(), ctypes.byref(given), ctypes.byref(session)) == 0
        library.bca_close(session)

    shown = fake_ort_options(release, tmp_path / "log", open_it)
    assert f"session.intra_op.allow_spinning {told}\n" in shown


def test_each_thread_has_its_own_last_error(library: ctypes.CDLL, opened: ctypes.c_void_p) -> None:
    library.bca_run(None, None, 0, None, 0, None)
    seen: list[bytes] = []
    thread = threading.Thread(target=lambda: seen.append(library.bca_last_error()))
    thread.start()
    thread.join()
    assert seen == [b""]
    assert library.bca_last_error() == b"the session is null; open one with bca_open"


def test_closing_null_is_allowed(library: ctypes.CDLL) -> None:
    library.bca_close(None)


# Building, installing, linking.


def test_the_readmes_commands_build_and_install_and_its_snippets_compile_and_run(
    release: Path, exported: Bundle, tmp_path: Path
) -> None:
    for name in ("runtime", "examples"):
        (tmp_path / name).symlink_to(native.ROOT / name)
    passed([Path(shutil.which("bca-export", path=native.environment()["PATH"]) or ""), *FIRST], tmp_path)
    build, server, tool = snippets("sh")
    for command in build.strip().splitlines():  # quicker to compile so; the release build has the default flags
        passed(["bash", "-c", command], tmp_path, CMAKE_GENERATOR="Ninja", CMAKE_BUILD_TYPE="None")
    prefix = tmp_path / "build" / "prefix"
    assert first_program(tmp_path, server).startswith(
        "2 x 7 x 64\nonnxruntime-cpu: models/fp32.onnxruntime-cpu.onnx on onnxruntime "
    )
    path = f"{prefix / 'bin'}{os.pathsep}{native.environment()['PATH']}"
    for command in tool.strip().splitlines():
        passed(["bash", "-c", command], tmp_path, PATH=path)
    flags = [f"-I{prefix / 'include'}", f"-L{prefix / 'lib'}", f"-Wl,-rpath,{prefix / 'lib'}", "-Wall", "-Wextra", "-Werror"]
    compiled = [("cpp", "g++", "-std=c++17", text) for text in snippets("cpp")] + [
        ("c", "gcc", "-std=c99", t) for t in snippets("c")
    ]
    assert len(compiled) == 4
    for number, (ending, compiler, standard, text) in enumerate(compiled):
        source = tmp_path / f"snippet{number}.{ending}"
        source.write_text(text)
        passed([compiler, standard, source, *flags, "-lbca_runtime", "-o", tmp_path / f"snippet{number}"])
        passed([tmp_path / f"snippet{number}"], tmp_path)


def test_the_snippet_of_the_main_readme_compiles(release: Path, tmp_path: Path) -> None:
    (short,) = snippets("cpp", SESSION_PAGE)
    tensors = ", ".join(f"const bca::Tensor& {name}" for name in ("x", "context", "mask"))
    source = tmp_path / "short.cpp"
    source.write_text(f"#include <bca/session.hpp>\nvoid use({tensors}) {{\n{short}}}\n")
    passed(["g++", "-std=c++17", "-fsyntax-only", f"-I{native.ROOT / 'runtime' / 'include'}", source])


FIRST = (
    "--checkpoint",
    "examples/01_digits/matcher.safetensors",
    "--prefix",
    "fusion.",
    "--heads",
    "4",
    "--out",
    "build/first",
)


def first_program(where: Path, commands: str) -> str:
    """What the first program prints, made and run as written in a folder with no more than the README says."""
    for name, text in (("CMakeLists.txt", snippets("cmake")[0]), ("server.cpp", snippets("cpp")[0])):
        assert f"`server/{name}`" in README
        (where / "server").mkdir(exist_ok=True)
        (where / "server" / name).write_text(text)
    archive = where / "onnxruntime-linux-x64"  # laid out as ONNX Runtime's release archive
    (archive / "lib").mkdir(parents=True)
    (archive / "include").symlink_to(native.SDK / "onnxruntime" / "include")
    (archive / "lib" / "libonnxruntime.so").symlink_to(native.ort_library())
    alone = {"ORT_ROOT": str(archive), "BCA_ORT_LIBRARY": "", "CMAKE_PREFIX_PATH": "", "CMAKE_GENERATOR": "Ninja"}
    return [passed(["bash", "-c", command], where, **alone) for command in commands.strip().splitlines()][-1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-DORT_ROOT=/nowhere"], "ONNX Runtime is not found: no onnxruntime_c_api.h below ORT_ROOT='/nowhere'. Give"),
        (
            ["-DBCA_ONNXRUNTIME=OFF", "-DBCA_TENSORRT=ON", "-DTENSORRT_ROOT=/nowhere"],
            "TensorRT is not found: no NvInferRuntime.h",
        ),
        (["-DBCA_ONNXRUNTIME=OFF", "-DBCA_TENSORRT=ON", "-DBCA_RTX=ON"], "build the library once for each"),
    ],
)
def test_a_missing_sdk_is_named_with_the_option_to_give(release: Path, tmp_path: Path, flags: list[str], message: str) -> None:
    done = configure(tmp_path, *flags)
    assert done.returncode != 0
    assert message in " ".join(done.stderr.split())


def configure(where: Path, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    bare = {"ORT_ROOT": "", "TENSORRT_ROOT": "", "CUDA_ROOT": ""}
    command: list[str | Path] = ["cmake", "-G", "Ninja", "-S", native.ROOT / "runtime", "-B", where, *flags]
    return native.run(command, native.ROOT, **bare | environment)


def cached(where: Path, name: str) -> str:
    found = re.search(rf"^{name}:PATH=(.*)$", (where / "CMakeCache.txt").read_text(), flags=re.MULTILINE)
    assert found
    return found[1]


def test_another_root_is_seen_in_a_directory_that_was_configured_before(release: Path, tmp_path: Path) -> None:
    right, other, build = native.SDK / "onnxruntime", tmp_path / "other", tmp_path / "build"
    other.symlink_to(right)
    assert configure(build, f"-DORT_ROOT={right}").returncode == 0
    assert configure(build, f"-DORT_ROOT={other}").returncode == 0
    assert cached(build, "BCA_ORT_INCLUDE").startswith(str(other))
    done = configure(build, "-DORT_ROOT=/nowhere", ORT_ROOT=str(right))
    assert done.returncode != 0
    assert "no onnxruntime_c_api.h below ORT_ROOT='/nowhere'" in " ".join(done.stderr.split())
    assert configure(build, f"-DORT_ROOT={right}").returncode == 0


def test_the_headers_of_cuda_are_found_in_the_toolkit_that_cmake_finds(release: Path, tmp_path: Path) -> None:
    toolkit = tmp_path / "toolkit"
    (toolkit / "bin").mkdir(parents=True)
    (toolkit / "lib64").mkdir()
    (toolkit / "lib64" / "libcudart.so").touch()
    (toolkit / "include").symlink_to(native.SDK / "cuda" / "include")
    (toolkit / "version.json").write_text('{"cuda": {"version": "13.0.0"}}')
    nvcc = toolkit / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.48'\necho '#$ TOP={toolkit}' >&2\n")
    nvcc.chmod(0o755)
    flags = ["-DBCA_ONNXRUNTIME=OFF", "-DBCA_TENSORRT=ON", f"-DTENSORRT_ROOT={native.SDK / 'tensorrt'}"]
    done = configure(tmp_path / "build", *flags, f"-DCUDAToolkit_ROOT={toolkit}")
    assert done.returncode == 0, done.stderr
    assert cached(tmp_path / "build", "BCA_CUDA_INCLUDE") == str(toolkit / "include")


def test_without_onnxruntime_the_choice_of_backends_compiles_and_names_the_option(release: Path, tmp_path: Path) -> None:
    passed(
        [
            "cmake",
            "-G",
            "Ninja",
            "-S",
            native.ROOT / "runtime",
            "-B",
            tmp_path,
            "-DBCA_ONNXRUNTIME=OFF",
            "-DCMAKE_BUILD_TYPE=None",
        ]
    )
    made = "CMakeFiles/bca_objects.dir/src/backends.cpp.o"
    passed(["ninja", made], tmp_path)
    assert b"BCA_ONNXRUNTIME\0" in (tmp_path / made).read_bytes()
    assert "OrtRunner" not in passed(["nm", "-C", tmp_path / made])


def test_the_library_is_small_and_shows_only_its_interface(release: Path, tmp_path: Path) -> None:
    passed(["strip", "-o", tmp_path / "stripped.so", release / "libbca_runtime.so"])
    assert (tmp_path / "stripped.so").stat().st_size < 1_000_000
    symbols = passed(["nm", "-DC", "--defined-only", release / "libbca_runtime.so"]).splitlines()
    names = {line.split(maxsplit=2)[2] for line in symbols}
    headers = "".join(path.read_text() for path in (native.ROOT / "runtime" / "include" / "bca").iterdir())
    assert {name for name in names if name.startswith("bca_")} == set(re.findall(r"BCA_PUBLIC [^;(]*?(bca_\w+)\(", headers))
    classes = set(re.findall(r"class BCA_API (\w+)", headers)) | {"Dims"}
    functions = set(re.findall(r"^BCA_API [^(]*?(\w+)\(", headers, flags=re.MULTILINE))
    shown = {re.sub(r"^(typeinfo|typeinfo name|vtable) for ", "", name) for name in names if not name.startswith("bca_")}
    found = {re.match(r"bca::(\w+)", name) for name in shown}
    assert None not in found, shown
    assert {match[1] for match in found if match} == classes | functions
    assert [name for name in shown if "::State::" in name] == []


# The gRPC server, called by the public client.

grpcclient = pytest.importorskip("tritonclient.grpc")
grpc = pytest.importorskip("grpc")


@pytest.fixture
def server(release: Path) -> Iterator[Any]:
    started: list[subprocess.Popen[str]] = []

    def start(*flags: str, bundle: Path = FIXTURE, **more: str) -> tuple[Any, subprocess.Popen[str]]:
        command = [release / "examples" / "grpc_server", bundle, "--address", "127.0.0.1:0", *flags]
        environment, pipes = native.environment(**more), {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen(command, env=environment, text=True, **pipes)
        started.append(process)
        assert process.stdout
        line = process.stdout.readline()
        found = re.match(r"listening on port (\d+), model (\w+)", line)
        assert found, line + (process.stderr.read() if process.stderr else "")
        return grpcclient.InferenceServerClient(f"127.0.0.1:{found[1]}"), process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def request(arrays: dict[str, np.ndarray]) -> list[Any]:
    sent = []
    for name, array in arrays.items():
        tensor = grpcclient.InferInput(name, array.shape, "BOOL" if array.dtype == bool else "FP32")
        tensor.set_data_from_numpy(array)
        sent.append(tensor)
    return sent


def test_the_server_answers_the_public_client(server: Any) -> None:
    client, _ = server()
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("model")
    metadata = client.get_model_metadata("model", as_json=True)
    assert metadata["inputs"][0] == {"name": "x", "datatype": "FP32", "shape": ["-1", "-1", "8"]}
    assert [t["name"] for t in metadata["outputs"]] == ["out", "context_out"]
    with bca_deploy.open(FIXTURE, threads=1) as session:
        for shape, masked in (((1, 2, 3), True), ((4, 16, 16), True), ((2, 5, 7), False)):
            given = inputs(*shape, masked, dims=(8, 6))
            got = client.infer("model", request(given), request_id="seven")
            assert got.get_response().id == "seven"
            for name, array in session.run(given).items():
                assert is_same(got.as_numpy(name), array)
        only = client.infer("model", request(given), outputs=[grpcclient.InferRequestedOutput("context_out")])
        assert only.as_numpy("out") is None
        assert only.as_numpy("context_out").shape == (2, 7, 6)


def test_the_server_takes_elements_in_the_message_too(server: Any) -> None:
    from tritonclient.grpc import service_pb2, service_pb2_grpc

    client, _ = server()
    given = inputs(1, 2, 3, dims=(8, 6))
    message = service_pb2.ModelInferRequest(model_name="model")
    for name, array in given.items():
        tensor = message.inputs.add(name=name, datatype="BOOL" if array.dtype == bool else "FP32", shape=array.shape)
        (tensor.contents.bool_contents if array.dtype == bool else tensor.contents.fp32_contents).extend(array.ravel().tolist())
    answer = service_pb2_grpc.GRPCInferenceServiceStub(client._channel).ModelInfer(message)
    got = client.infer("model", request(given))
    out = got.as_numpy("out")
    assert is_same(np.frombuffer(answer.raw_output_contents[0], np.float32).reshape(out.shape), out)


def refusal(call: Any) -> tuple[str, str]:
    with pytest.raises(grpcclient.InferenceServerException) as error:
        call()
    return error.value.status(), error.value.message()


def test_the_server_refuses_in_the_sessions_words(server: Any) -> None:
    client, _ = server()
    code, message = refusal(lambda: client.infer("model", request(inputs(1, 17, 3, dims=(8, 6)))))
    assert code == "StatusCode.INVALID_ARGUMENT"
    assert message.startswith("input x: axis 1 (x_len) is 17, allowed 1 to 16; ")
    assert refusal(lambda: client.infer("other", request(inputs(1, 2, 3, dims=(8, 6)))))[0] == "StatusCode.NOT_FOUND"
    twice = [*request(inputs(1, 2, 3, dims=(8, 6))), *request(inputs(1, 2, 3, dims=(8, 6)))]
    assert refusal(lambda: client.infer("model", twice)) == ("StatusCode.INVALID_ARGUMENT", "input x is given twice")
    short = request(inputs(1, 2, 3, dims=(8, 6)))
    short[0].set_shape([1, 2, 9])
    assert "has 64 bytes of data, and its shape needs 72" in refusal(lambda: client.infer("model", short))[1]
    short[0].set_shape([-1, 2, 8])
    assert "has a negative size" in refusal(lambda: client.infer("model", short))[1]
    short[0].set_shape([1, 2, 8])
    short[0].set_shared_memory("region", 64)
    assert "this server has no shared memory" in refusal(lambda: client.infer("model", short))[1]
    assert client.is_server_live()  # none of that has hurt it


def test_the_server_writes_an_output_once_and_has_one_version(server: Any) -> None:
    from tritonclient.grpc import service_pb2, service_pb2_grpc

    client, _ = server()
    given = request(inputs(1, 2, 3, dims=(8, 6)))
    outputs = [grpcclient.InferRequestedOutput(name) for name in ("out", "context_out", "out")]
    twice = refusal(lambda: client.infer("model", given, outputs=outputs))
    assert twice == ("StatusCode.INVALID_ARGUMENT", "output out is asked for twice")
    many = service_pb2.ModelInferRequest(model_name="model")
    many.outputs.extend(many.InferRequestedOutputTensor(name="out") for _ in range(100_000))
    with pytest.raises(grpc.RpcError, match="output out is asked for twice"):  # before its inputs are looked at
        service_pb2_grpc.GRPCInferenceServiceStub(client._channel).ModelInfer(many)
    assert client.infer("model", given, model_version="1").get_response().model_version == "1"
    code, message = refusal(lambda: client.infer("model", given, model_version="7"))
    assert (code, message) == ("StatusCode.NOT_FOUND", "there is no version '7' of model here; there is 1, or leave it out")
    assert refusal(lambda: client.get_model_metadata("model", "7"))[0] == "StatusCode.NOT_FOUND"
    assert client.is_model_ready("model", "1")
    assert refusal(lambda: client.is_model_ready("model", "7")) == (code, message)
    assert refusal(lambda: client.is_model_ready("other"))[0] == "StatusCode.NOT_FOUND"


def test_a_message_that_cannot_be_read_is_answered_with_a_text(server: Any) -> None:
    client, _ = server()
    text = "the message cannot be read as what this call takes; send what inference.proto says"
    for call, sent in (("ModelInfer", b"\xff\xff\xff"), ("ModelInfer", b"\x0a\x02\xff\xfe"), ("ModelMetadata", b"\x0a\x7f")):
        with pytest.raises(grpc.RpcError) as error:
            client._channel.unary_unary(f"/inference.GRPCInferenceService/{call}")(sent)
        assert (error.value.code(), error.value.details()) == (grpc.StatusCode.INVALID_ARGUMENT, text)
    assert client.is_server_live()


def test_a_refusal_is_short_whatever_the_client_sent(server: Any) -> None:
    client, _ = server()
    for name in ("n" * 50_000, "ü" * 25_000):
        for call in (
            lambda name=name: client.is_model_ready(name),
            lambda name=name: client.get_model_metadata("model", name),
            lambda name=name: client.infer("model", request({name: np.zeros((1, 2, 8), np.float32)})),
        ):
            code, message = refusal(call)
            assert code in ("StatusCode.NOT_FOUND", "StatusCode.INVALID_ARGUMENT")
            assert len(message.encode()) <= 1003
            assert message.endswith("...")


def health(client: Any, service: bytes = b"") -> bytes:
    sent = b"\x0a" + bytes([len(service)]) + service if service else b""
    return client._channel.unary_unary("/grpc.health.v1.Health/Check")(sent)


SERVING, NOT_SERVING = b"\x08\x01", b"\x08\x02"


def test_the_server_has_grpcs_own_health_service_and_reflection(server: Any) -> None:
    client, _ = server()
    assert health(client) == health(client, b"inference.GRPCInferenceService") == SERVING
    with pytest.raises(grpc.RpcError) as error:
        health(client, b"other")
    assert error.value.code() == grpc.StatusCode.NOT_FOUND
    call = client._channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
    assert b"inference.GRPCInferenceService" in next(call(iter([b"\x3a\x00"])))  # which services there are


def test_the_servers_threads_do_not_spin(release: Path, tmp_path: Path) -> None:
    def open_it(ort: bytes) -> None:  # the double's outputs are not the model's, so the server ends by itself
        done = native.run([release / "examples" / "grpc_server", FIXTURE], BCA_ORT_LIBRARY=ort.decode())
        assert "self-test" in done.stderr

    assert "session.intra_op.allow_spinning 0\n" in fake_ort_options(release, tmp_path / "log", open_it)


def test_messages_over_the_limit_are_refused(server: Any) -> None:
    client, _ = server("--max-message-mb", "1")
    code, message = refusal(lambda: client.infer("model", request({"x": np.zeros((1, 40_000, 8), np.float32)})))
    assert code == "StatusCode.RESOURCE_EXHAUSTED"
    assert "1048576" in message


@pytest.fixture
def held(server: Any, release: Path, tmp_path: Path) -> Held:
    return Held(server, release, tmp_path)


SMALL = {"batch": 1, "x_len": 2, "context_len": 3, "dims": (8, 6)}


def answered(call: "Future[Any]") -> bool:
    return call.result().as_numpy("out").shape == (1, 2, 8)


def test_a_request_waits_for_a_place_no_longer_than_the_servers_limit_or_its_own(held: Held) -> None:
    client, _ = held.serve("--concurrency", "1", "--time-limit-ms", "50")
    given = request(inputs(**SMALL))
    with ThreadPoolExecutor() as pool, held:
        slow = pool.submit(client.infer, "model", given)
        held.at_work(1)
        code, message = refusal(lambda: client.infer("model", given))
        assert (code, message) == ("StatusCode.DEADLINE_EXCEEDED", "no place became free in time; try again later")
        assert refusal(lambda: client.infer("model", given, client_timeout=0.02))[0] == "StatusCode.DEADLINE_EXCEEDED"
        assert not slow.done()
    assert answered(slow)  # the time limit is for waiting
    assert client.infer("model", given).as_numpy("out").shape == (1, 2, 8)


def test_only_so_many_requests_wait(held: Held) -> None:
    client, _ = held.serve("--concurrency", "1", "--queue", "1", "--time-limit-ms", PATIENT_MS)
    given = request(inputs(**SMALL))
    with ThreadPoolExecutor() as pool, held:
        calls = [pool.submit(client.infer, "model", given)]
        held.at_work(1)
        calls += [pool.submit(client.infer, "model", given) for _ in range(2)]  # one of them waits, whichever it is
        (third,), two = wait(calls, PATIENCE_S, FIRST_COMPLETED)
        code, message = refusal(third.result)
        assert (code, message) == ("StatusCode.RESOURCE_EXHAUSTED", "1 requests are waiting already; try again later")
    assert all(answered(call) for call in two)


def test_a_stop_lets_requests_at_work_end_refuses_new_ones_and_leaves_with_0(held: Held) -> None:
    client, process = held.serve("--concurrency", "2", "--grace-ms", PATIENT_MS)
    given = request(inputs(**SMALL))
    with ThreadPoolExecutor() as pool, held:
        slow = [pool.submit(client.infer, "model", given) for _ in range(2)]
        held.at_work(2)
        process.send_signal(signal.SIGTERM)
        until(lambda: not client.is_server_ready())
        assert health(client) == NOT_SERVING
        refused = refusal(lambda: client.infer("model", given))
        assert refused == ("StatusCode.UNAVAILABLE", "the server is stopping; ask another")
        assert not any(call.done() for call in slow)
    assert all(answered(call) for call in slow)
    assert process.wait(PATIENCE_S) == 0
    assert process.stdout
    assert process.stdout.read() == "stopped\n"


def test_a_stop_waits_no_longer_than_its_limit(held: Held) -> None:
    client, process = held.serve("--concurrency", "1", "--grace-ms", "1")
    with ThreadPoolExecutor() as pool, held:
        slow = pool.submit(client.infer, "model", request(inputs(**SMALL)))
        held.at_work(1)
        process.send_signal(signal.SIGTERM)
        assert refusal(slow.result)[0] in ("StatusCode.CANCELLED", "StatusCode.UNAVAILABLE")
    assert process.wait(PATIENCE_S) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--queue", "none"], "--queue is 'none'; it must be a whole number from 1 to 1000000000"),
        (["--max-message-mb", "2048"], "--max-message-mb is '2048'; it must be a whole number from 1 to 2047"),
        (["--wrong"], "'--wrong' is unknown or lacks its value"),
        (["--address", "999.0.0.1:1"], "999.0.0.1:1 cannot be listened on"),
    ],
)
def test_a_server_that_cannot_start_says_why(release: Path, flags: list[str], message: str) -> None:
    done = native.run([release / "examples" / "grpc_server", FIXTURE, *flags])
    assert done.returncode == 2
    assert message in done.stderr
