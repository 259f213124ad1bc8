"""Fixtures that cost a trace are made once per session; everything else is made where it is used."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from support.layers import make_checkpoint
from support.servers import Server, bca_serve, put_stand_in, tritonserver

import bca_deploy
from bca_deploy.bundle.read import Bundle

# A suite that was started in the background of a shell script, or by nohup, inherits that ctrl-C is ignored, and so would
# every command that it runs.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples every day, and none of them timed: a failure must be the change's, not the day's or the machine's.
settings.register_profile("suite", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle with an fp32 and an fp16 model of a masked prenorm layer. Do not change it; copy its directory."""
    out = tmp_path_factory.mktemp("exported") / "model"
    module = make_checkpoint(prenorm=True).module(torch.float32)
    return bca_deploy.export(module, out, precision=("fp32", "fp16"))


@pytest.fixture(scope="session")
def served(exported: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`bca serve` over that bundle. Leave it running."""
    with bca_serve(exported.directory, tmp_path_factory.mktemp("served") / "log") as server:
        yield server


@pytest.fixture(scope="session")
def triton(exported: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The real Triton over that bundle's repository, its engine model played by the same file on onnxruntime."""
    from bca_deploy.packaging import triton_repository as packaging

    root = tmp_path_factory.mktemp("triton")
    _, engine = packaging.write(exported, root / "models", packaging.Options())
    put_stand_in(engine)
    with tritonserver(root / "models", root / "log") as server:
        yield server


@pytest.fixture
def repository() -> Path:
    return Path(__file__).resolve().parents[1]
