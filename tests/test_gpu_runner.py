"""Running an engine, without a GPU: which profile, what is refused, and that outputs are this call's or none."""

import ctypes
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from test_bundle import run_without
from test_parity import subject_of

from bca_deploy import nvidia
from bca_deploy.engine_runner import Ranges, Session, choose_profile, engine_runner, open_engine
from bca_deploy.errors import EngineError
from bca_deploy.parity import judge
from bca_deploy.runners import Runner, ort_runner
from bca_deploy.spec import Interface

Shape = tuple[int, ...]
SHORT: Ranges = {"x": ((1, 1, 8), (4, 8, 8), (8, 64, 8)), "mask": ((1, 1), (4, 8), (8, 64))}
LONG: Ranges = {"x": ((1, 1, 8), (4, 256, 8), (8, 512, 8)), "mask": ((1, 1), (4, 256), (8, 512))}


class Dims(tuple[int, ...]):
    """As TensorRT's, as far as it is used: a length and items."""


class Engine:
    """An engine and its context in one, whose only output ``out`` is ``x`` doubled where ``mask`` is true.

    ``profiles`` are its profiles; ``refuses`` names the function that fails; ``fixed`` gives it fixed shapes.
    """

    def __init__(self, kind: str = "FLOAT", profiles: tuple[Ranges, ...] = (SHORT, LONG), refuses: str = "") -> None:
        self.kinds = {"x": kind, "mask": "BOOL", "out": kind}
        self.profiles, self.refuses = profiles, refuses
        self.num_io_tensors, self.num_optimization_profiles = 3, len(profiles)
        self.active_optimization_profile = 0
        self.shapes: dict[str, Shape] = {}
        self.addresses: dict[str, int] = {}
        self.fixed: dict[str, Shape] = {}

    def create_execution_context(self) -> Any:
        return None if self.refuses == "create_execution_context" else self

    def get_tensor_name(self, index: int) -> str:
        return list(self.kinds)[index]

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=self.kinds[name])

    def get_tensor_mode(self, name: str) -> Any:
        return SimpleNamespace(name="OUTPUT" if name == "out" else "INPUT")

    def get_tensor_shape(self, name: str) -> Dims:
        shapes = self.shapes or self.fixed or {"x": (-1, -1, 8), "mask": (-1, -1)}
        return Dims(shapes["x" if name == "out" else name])

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[Dims]:
        return [Dims(shape) for shape in self.profiles[profile][name]]

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.active_optimization_profile = profile
        return self.refuses != "set_optimization_profile_async"

    def set_input_shape(self, name: str, shape: Shape) -> bool:
        self.shapes[name] = shape
        return self.refuses != "set_input_shape"

    def infer_shapes(self) -> list[str]:
        return ["mask"] if self.refuses == "infer_shapes" else []

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return self.refuses != "set_tensor_address"

    def execute_async_v3(self, stream: int) -> bool:
        if self.refuses == "execute_async_v3":
            return False
        if self.refuses != "writing":
            arrays = {name: self._array(name) for name in self.kinds}
            arrays["out"][...] = np.where(arrays["mask"][..., None], arrays["x"] * 2, 0)
        return True

    def _array(self, name: str) -> np.ndarray:
        dtype = {"FLOAT": np.float32, "HALF": np.float16, "BF16": ml_dtypes.bfloat16, "BOOL": np.bool_}[self.kinds[name]]
        shape = self.shapes["x" if name == "out" else name]
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return np.frombuffer((ctypes.c_char * size).from_address(self.addresses[name]), dtype).reshape(shape)


class Stream:
    """The CPU's: everything is done at once."""

    cuda_stream = 0
    broken = False

    def synchronize(self) -> None:
        if self.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nand much more")


def session(engine: Engine, stream: Stream | None = None, *said: str) -> Session:
    return Session(engine, torch.device("cpu"), stream or Stream(), list(said))  # type: ignore[arg-type]


def inputs(length: int = 8, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    x = np.arange(2 * length * 8).reshape(2, length, 8).astype(dtype)
    return {"x": x, "mask": np.arange(length)[None] < np.array([[length], [length // 2]])}


def sizes(length: int) -> Mapping[str, Shape]:
    return {"x": (4, length, 8), "mask": (4, length)}


# ---- the profile


@pytest.mark.parametrize(
    ("length", "profile"),
    [
        (1, 0),
        (8, 0),
        (44, 0),  # 5.5 times 8, and 256 is 5.8 times 44
        (46, 1),
        (64, 1),
        (65, 1),  # too long for the first
        (512, 1),
    ],
)
def test_the_nearest_profile_that_holds_the_shapes_is_chosen(length: int, profile: int) -> None:
    assert choose_profile([SHORT, LONG], sizes(length)) == profile
    assert choose_profile([LONG, SHORT], sizes(length)) == 1 - profile


def test_of_equal_profiles_the_first_is_chosen() -> None:
    assert choose_profile([SHORT, SHORT], sizes(8)) == 0


@pytest.mark.parametrize(
    "shapes", [sizes(513), {"x": (9, 8, 8), "mask": (9, 8)}, {"x": (4, 8, 7), "mask": (4, 8)}, {"x": (4, 8)}]
)
def test_shapes_that_no_profile_holds_are_refused(shapes: Mapping[str, Shape]) -> None:
    said = r"^no profile of the engine holds x \[.*; it has: x \[1, 1, 8\] to \[8, 64, 8\], mask \[1, 1\] to \[8, 64\]; x \["
    with pytest.raises(EngineError, match=said):
        choose_profile([SHORT, LONG], shapes)


# ---- a call


def test_the_outputs_come_by_name_for_every_shape() -> None:
    engine = Engine()
    run = session(engine)
    for length, profile in ((8, 0), (300, 1), (3, 0)):
        given = inputs(length)
        assert np.array_equal(run(given)["out"], np.where(given["mask"][..., None], given["x"] * 2, 0))
        assert engine.active_optimization_profile == profile


@pytest.mark.parametrize(("kind", "dtype"), [("HALF", np.float16), ("BF16", ml_dtypes.bfloat16)])
def test_halves_go_in_and_come_out(kind: str, dtype: Any) -> None:
    given = inputs(dtype=dtype)
    out = session(Engine(kind))(given)["out"]
    assert out.dtype == dtype
    assert np.array_equal(out, np.where(given["mask"][..., None], given["x"] * 2, 0).astype(dtype))


def test_inputs_may_be_read_only_and_have_gaps() -> None:
    given = inputs(16)
    views = {"x": np.broadcast_to(given["x"][:1, ::2], (2, 8, 8)), "mask": given["mask"][:, ::2]}
    assert np.array_equal(session(Engine())(views)["out"], np.where(views["mask"][..., None], views["x"] * 2, 0))


def test_a_static_engine_takes_its_shapes_and_no_other() -> None:
    engine = Engine(profiles=({},))
    engine.fixed = {"x": (2, 8, 8), "mask": (2, 8)}
    run = session(engine)
    assert run(inputs(8))["out"].shape == (2, 8, 8)
    with pytest.raises(EngineError, match=r"holds x \[2, 9, 8\], mask \[2, 9\]; it has: x \[2, 8, 8\] to \[2, 8, 8\], mask"):
        run(inputs(9))


# ---- parity


def test_parity_judges_what_it_is_given_to_run_on(tmp_path: Path) -> None:
    subject = subject_of(tmp_path, interface=Interface(), precision="fp16")
    asked: list[Path] = []

    def runtimes(path: Path) -> dict[str, Runner]:
        asked.append(path)
        return {"mine": ort_runner(path)}

    verdict, usual = judge(subject, "quick", runtimes=runtimes), judge(subject, "quick")
    assert verdict, verdict.failures
    # The model, and a copy of it with weights for each further sharpness.
    assert asked[0] == subject.path
    assert [path.name.partition("-")[0] for path in asked[1:]] == ["sharpened"] * 2
    assert [replace(r, runtime="onnxruntime") for r in verdict.results] == [
        r for r in usual.results if r.runtime == "onnxruntime"
    ]
    assert usual.notes
    assert verdict.notes == ()  # they are about the runtimes of the CPU


# ---- what is refused


@pytest.mark.parametrize(
    ("refuses", "length", "message"),
    [
        ("execute_async_v3", 8, "the call: out of memory"),
        ("set_tensor_address", 8, "the address of x: out of memory"),
        ("set_input_shape", 8, r"shape \[2, 8, 8\] of x: out of memory"),
        ("set_optimization_profile_async", 300, "profile 1: out of memory"),
        ("infer_shapes", 8, "the shapes: they leave mask open: out of memory"),
    ],
)
def test_a_call_that_fails_gives_no_outputs(refuses: str, length: int, message: str) -> None:
    engine = Engine()
    run = session(engine)
    assert run(inputs(8))
    engine.refuses = refuses
    run.said = SaidLater(["out of memory\nand more"])
    with pytest.raises(EngineError, match=f"^the engine refused {message}$"):
        run(inputs(length))


class SaidLater(list[str]):
    """What the library says during the call, which clears what it said before."""

    def clear(self) -> None:
        """Keep it."""


def test_the_reason_is_this_calls() -> None:
    with pytest.raises(EngineError, match=r"^the engine refused the call: the library gives no reason$"):
        session(Engine(refuses="execute_async_v3"), None, "said while opening")(inputs())


def test_a_cuda_error_found_while_waiting_is_the_calls() -> None:
    stream = Stream()
    stream.broken = True
    with pytest.raises(EngineError, match=r"^the engine failed: CUDA error: an illegal memory access was encountered$"):
        session(Engine(), stream)(inputs())


def test_what_the_engine_does_not_write_is_nan() -> None:
    engine = Engine()
    run = session(engine)
    assert np.isfinite(run(inputs())["out"]).all()
    engine.refuses = "writing"
    assert np.isnan(run(inputs())["out"]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.zeros((2, 8, 8), np.float16)}, "^input x is float16; the engine takes float32$"),
        ({"mask": np.ones((2, 8), np.uint8)}, "^input mask is uint8; the engine takes bool$"),
        ({"bias": np.zeros(1)}, r"^inputs \['bias', 'mask', 'x'\]; the engine takes \['mask', 'x'\]$"),
    ],
)
def test_inputs_that_the_engine_would_misread_are_refused(change: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        session(Engine())(inputs() | change)


def test_an_engine_without_memory_or_of_other_types_is_refused() -> None:
    with pytest.raises(EngineError, match=r"^the engine gets no execution context: out of memory$"):
        session(Engine(refuses="create_execution_context"), None, "out of memory")
    with pytest.raises(EngineError, match=r"^the engine's x is FP8; models here have FLOAT, HALF, BF16, BOOL$"):
        session(Engine("FP8"))


# ---- opening


def test_an_absent_engine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"^engine .*/none.engine does not exist; build it with bca build$"):
        open_engine(nvidia.load("rtx"), tmp_path / "none.engine", host_code=False, said=[])


@pytest.mark.parametrize("host_code", [False, True])
def test_what_is_no_engine_does_not_open(tmp_path: Path, host_code: bool) -> None:
    path = tmp_path / "x.engine"
    path.write_bytes(b"no engine" * 100)
    said: list[str] = []
    with pytest.raises(EngineError, match=r"^x.engine does not open here: .*Serialization") as refused:
        open_engine(nvidia.load("rtx"), path, host_code, said)
    assert said[0].splitlines()[0] in str(refused.value)


def test_without_a_gpu_nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EngineError, match=r"^running x.engine takes a GPU, and torch \S+ sees none; run it on a machine with"):
        engine_runner(tmp_path / "x.engine", "rtx")


def test_without_the_library_the_command_is_given() -> None:
    script = """
from bca_deploy.engine_runner import engine_runner
from bca_deploy.errors import MissingDependencyError
from pathlib import Path
try:
    engine_runner(Path("x.engine"), "tensorrt")
except MissingDependencyError as error:
    print(error)
"""
    done = run_without(("tensorrt", "onnx", "onnxruntime"), script)
    assert (done.stdout, done.stderr) == ("tensorrt is not installed; run: pip install 'bca-deploy[tensorrt]'\n", "")
