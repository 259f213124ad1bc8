"""How far a bundle is known to be the function that its user runs: parity holds what was built here against itself."""

from typing import Literal

#: Proven on the live module, proven on a sample of its inputs and outputs, or taken on trust from a file of weights.
Trust = Literal["live-module", "sample", "on-trust"]

_SAID: dict[Trust, str] = {
    "live-module": "proven on the live module: held against the code that runs it",
    "sample": "proven on a sample: gives what your own code gave",
    "on-trust": (
        "taken on trust: parity cannot see wrong heads or another forward pass; to prove it, export with a sample of your own "
        "code's inputs and outputs (--expect sample.npz), or the live module (bca_deploy.export)"
    ),
}


def said(trust: Trust) -> str:
    """Return the level in words, and how to prove what is taken on trust."""
    return _SAID[trust]
