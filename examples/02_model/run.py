"""Run every held-out pair through the exported matcher, without torch, and compare with what PyTorch said of it."""

import argparse
import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import bca_deploy

_NAMES = ("left", "right", "left_mask", "right_mask")
_HELD_OUT = Path(__file__).resolve().with_name("held_out.npz")


@contextlib.contextmanager
def served(bundle: Path) -> Iterator[bca_deploy.RemoteSession]:
    """Start ``bca serve`` on free ports, and yield a session that calls it over gRPC."""
    command = [sys.executable, "-m", "bca_deploy", "serve", str(bundle), "--http-port", "0", "--grpc-port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:  # noqa: S603
        try:
            ready = server.stdout.readline() if server.stdout else ""  # printed when it takes requests
            url = next(word.rstrip(":") for word in ready.split() if word.startswith("grpc://"))
            with bca_deploy.RemoteSession(url) as session:
                yield session
        finally:
            server.terminate()


def compare(session: bca_deploy.Session | bca_deploy.RemoteSession) -> bool:
    """Print how the exported matcher does beside PyTorch; return whether every prediction is the same."""
    with np.load(_HELD_OUT) as file:
        arrays = dict(file)
    batches = len(arrays) // (len(_NAMES) + 1)
    trained = np.concatenate([arrays[f"logits_{number}"] for number in range(batches)])
    found = [session(**{name: arrays[f"{name}_{number}"] for name in _NAMES})[0] for number in range(batches)]
    exported = np.concatenate(found)
    equal = int(((trained > 0) == (exported > 0)).sum())
    print(f"equal predictions         {equal} of {len(trained)}")
    print(f"largest logit difference  {np.abs(trained - exported).max():.1e}, of logits up to {np.abs(trained).max():.0f}")
    print(f"torch was imported        {'yes' if 'torch' in sys.modules else 'no'}")
    return equal == len(trained)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--serve", action="store_true", help="through a server and over gRPC")
    arguments = parser.parse_args()
    with served(arguments.bundle) if arguments.serve else bca_deploy.open(arguments.bundle) as session:
        return 0 if compare(session) else 1


if __name__ == "__main__":
    sys.exit(main())
