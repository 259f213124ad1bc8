"""The parts of the builder process that need no process: the meter, the request, the log, and writing whole or not at all."""

import errno
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.processes import HEAVY, run_without

from bca_deploy.engines import build_log, builder_process
from bca_deploy.engines.builder_process import Meter, Request

NAMES = st.sampled_from(["whole", "part", "detail"])
EVENTS = st.one_of(
    st.tuples(st.just("start"), NAMES, st.none() | NAMES, st.integers(0, 5)),
    st.tuples(st.just("step"), NAMES, st.integers(0, 6)),
    st.tuples(st.just("finish"), NAMES),
)


@given(st.lists(EVENTS, max_size=40))
def test_the_share_stays_within_0_and_1_and_never_goes_back(events: list[tuple[Any, ...]]) -> None:
    """Whatever a library calls, in whatever order: a phase may be unknown, empty, repeated or its own parent."""
    meter = Meter()
    for kind, *arguments in events:
        before = meter.shown
        grew = getattr(meter, kind)(*arguments)
        assert 0 <= before <= meter.shown <= 1
        if kind == "step":
            assert grew == (meter.shown > before)
            assert not grew or meter.shown >= before + 0.01


@given(st.integers(1, 50), st.integers(1, 20))
def test_nested_phases_count_as_steps_of_their_parent(steps: int, parts: int) -> None:
    meter = Meter()
    meter.start("whole", None, steps)
    for step in range(steps):
        meter.start("part", "whole", parts)
        for part in range(parts):
            meter.step("part", part)
            # What was too small to be shown is at most a hundredth.
            assert abs(meter.shown - (step + (part + 1) / parts) / steps) <= 0.011
        meter.finish("part")
        meter.step("whole", step)
    assert meter.shown > 0.989


def test_a_share_is_reported_only_where_it_grew_by_a_hundredth() -> None:
    meter = Meter()
    meter.start("whole", None, 10_000)
    assert sum(meter.step("whole", step) for step in range(10_000)) <= 100


def test_a_request_survives_the_way_to_the_other_process() -> None:
    request = Request(
        module="tensorrt_rtx",
        onnx="a model.onnx",
        out="an engine",
        log="log",
        events=3,
        profiles=[{"x": [[1, 1], [2, 2], [3, 3]]}],
        static=False,
        targets=["sm89"],
        options={"tf32": False, "workspace_mib": None},
    )
    assert Request(**json.loads(json.dumps(asdict(request)))) == request


def test_the_builder_process_imports_no_heavy_package() -> None:
    done = run_without(
        (*HEAVY, "pydantic", "numpy"),
        "import bca_deploy.engines.builder_process, bca_deploy.engines.builder_process as b; print(b.Meter().shown)",
    )
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "0.0\n")


def test_the_log_is_on_disk_after_every_line(tmp_path: Path) -> None:
    """A crash comes without warning: what was said before it has to be readable."""
    builder_process.load_library("tensorrt_rtx")
    severity = builder_process.trt.ILogger.Severity
    logger = builder_process.make_logger(str(tmp_path / "log"))
    logger.log(severity.VERBOSE, "Parsing node: first [MatMul]")
    assert build_log.read(tmp_path / "log").last_place() == "first [MatMul]"
    logger.log(severity.ERROR, "two\nlines, µ")
    assert build_log.read(tmp_path / "log").errors == ("two\nlines, µ",)


def test_a_file_is_written_whole(tmp_path: Path) -> None:
    builder_process._write(str(tmp_path / "engine"), memoryview(b"content"))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"engine": b"content"}


def test_a_disk_that_fills_up_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "engine").write_bytes(b"old")

    def full(self: Path, target: str) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        builder_process._write(str(tmp_path / "engine"), memoryview(b"new"))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"engine": b"old"}
