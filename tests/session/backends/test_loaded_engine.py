"""Opening an engine: what is none, what does not open, what nobody here could run."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cuda.core.utils import StridedMemoryView
from support.processes import run_without

from bca_deploy.engines import libraries
from bca_deploy.engines.gpus import query
from bca_deploy.errors import EngineError, InputError
from bca_deploy.session.backends.cuda import array_of, failing_as, open_gpu
from bca_deploy.session.backends.engine_runner import engine_runner
from bca_deploy.session.backends.loaded_engine import EngineOptions, LoadedEngine, Said, load_engine


def test_an_absent_engine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"^engine .*/none.engine does not exist; build it with bca build$"):
        load_engine(tmp_path / "none.engine", "rtx")


@pytest.mark.parametrize("host_code", [False, True])
def test_what_is_no_engine_does_not_open(tmp_path: Path, host_code: bool) -> None:
    path = tmp_path / "x.engine"
    path.write_bytes(b"no engine" * 100)
    with pytest.raises(EngineError, match=r"^x.engine does not open here: .*Serialization"):
        load_engine(path, "rtx", EngineOptions(host_code))


def test_an_element_type_that_no_model_here_has_is_refused() -> None:
    engine: Any = SimpleNamespace(
        num_io_tensors=1, get_tensor_name=lambda index: "x", get_tensor_dtype=lambda name: SimpleNamespace(name="FP8")
    )
    with pytest.raises(EngineError, match=r"^the engine's x is FP8; models here have FLOAT, HALF, BF16, BOOL, INT32, INT64$"):
        LoadedEngine(libraries.load("rtx"), engine, Said(), EngineOptions())


@pytest.mark.skipif(bool(query().found), reason="this machine has a GPU")
def test_without_a_gpu_nothing_runs(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"^opening GPU 0 failed on the GPU: "):
        engine_runner(tmp_path / "x.engine", "rtx")


@pytest.mark.parametrize("absent", ["tensorrt", "cuda"])
def test_without_a_library_the_command_is_given(absent: str) -> None:
    script = f"""
from bca_deploy.session.backends.engine_runner import engine_runner
from bca_deploy.errors import MissingDependencyError
from pathlib import Path
try:
    engine_runner(Path("x.engine"), "tensorrt" if {absent!r} == "tensorrt" else "rtx")
except MissingDependencyError as error:
    print(error)
"""
    done = run_without((absent, "torch", "onnx", "onnxruntime"), script)
    said = {"tensorrt": "tensorrt is not installed; run: pip install 'bca-deploy[tensorrt]'"}
    assert done.stdout.strip() == said.get(absent, "cuda-core is not installed; run: pip install cuda-core cuda-bindings")
    assert done.stderr == ""


def test_what_cuda_raises_is_told_in_one_line() -> None:
    with pytest.raises(EngineError, match=r"^the copy failed on the GPU: out of memory$"), failing_as("the copy"):
        raise RuntimeError("out of memory\nand more")
    with pytest.raises(EngineError, match=r"^the copy failed on the GPU: RuntimeError\(\)$"), failing_as("the copy"):
        raise RuntimeError


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "bool"])
def test_arrays_are_seen_where_they_are(dtype: str) -> None:
    tensor = torch.zeros(5, 1, 3, dtype=getattr(torch, dtype)).transpose(0, 1)  # contiguous: an axis of one has any stride
    seen = StridedMemoryView.from_dlpack(tensor, stream_ptr=-1)
    array = array_of("x", seen, tensor, -1)
    assert (array.address, array.shape, array.dtype.name) == (tensor.data_ptr(), (1, 5, 3), dtype)


def test_arrays_with_gaps_or_elsewhere_are_refused() -> None:
    tensor = torch.zeros(4, 6)
    for view in (tensor[:, ::2], tensor.t(), tensor[:, :3]):
        with pytest.raises(InputError, match=r"^input x has gaps between its elements; give a C-contiguous array$"):
            array_of("x", StridedMemoryView.from_dlpack(view, stream_ptr=-1), view, -1)
    with pytest.raises(InputError, match=r"^input x is on GPU -1, and this session runs on 0; move it there$"):
        array_of("x", StridedMemoryView.from_dlpack(tensor, stream_ptr=-1), tensor, 0)


@pytest.mark.parametrize(
    "name",
    [
        "Device.set_current Device.create_stream Device.allocate Device.default_stream",
        "Device.device_id Device.compute_capability",
        "Stream.sync Stream.handle Stream.create_graph_builder",
        "Buffer.from_handle Buffer.copy_from Buffer.fill Buffer.handle Buffer.size",
        "graph.GraphBuilder.begin_building graph.GraphBuilder.end_building graph.GraphBuilder.complete graph.Graph.launch",
        "utils.StridedMemoryView.from_dlpack utils.StridedMemoryView.from_buffer utils.StridedMemoryView.strides",
    ],
)
def test_every_name_that_we_use_is_in_cuda_core(name: str) -> None:
    import cuda.core
    import cuda.core.graph
    import cuda.core.utils

    for path in name.split():
        found: Any = cuda.core
        for part in path.split("."):
            found = getattr(found, part)
    assert open_gpu
