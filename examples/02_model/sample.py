"""Write what the export and the check need: two samples of the matcher's inputs, and its own logits on all held-out pairs."""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

_MATCHER = Path(__file__).resolve().parent.parent / "01_digits"
sys.path.insert(0, str(_MATCHER))  # model.py and data.py of the example before this one

from data import Pairs, held_out_batches, pad, pair_up, split_images  # noqa: E402
from model import Matcher  # noqa: E402

NAMES = ("left", "right", "left_mask", "right_mask")
# Pairs, padding on the left, padding on the right: no size is the same in both, so all three dimensions show.
SAMPLES = {"few.npz": (4, 3, 2), "many.npz": (12, 1, 3)}
HELD_OUT = "held_out.npz"


def sample(columns: torch.Tensor, pairs: int, left_padding: int, right_padding: int) -> dict[str, np.ndarray]:
    """Return the matcher's inputs for so many held-out pairs, by the names of forward's arguments."""
    generator = torch.Generator().manual_seed(0)
    left, right, _ = pair_up(columns[: pairs // 2], generator)
    left, left_mask = pad(left, left_padding, generator)
    right, right_mask = pad(right, right_padding, generator)
    return {name: tensor.numpy() for name, tensor in zip(NAMES, (left, right, left_mask, right_mask), strict=True)}


@torch.no_grad()
def held_out(matcher: Matcher, batches: list[Pairs]) -> dict[str, np.ndarray]:
    """Return each padded batch of held-out pairs with the logits that PyTorch gives: ``left_0``, ..., ``logits_0``, ..."""
    found = {}
    for number, pairs in enumerate(batches):
        arrays = dict(zip((*NAMES, "logits"), (*pairs[:4], matcher(*pairs[:4])), strict=True))
        found |= {f"{name}_{number}": tensor.numpy() for name, tensor in arrays.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=_MATCHER / "matcher.safetensors", help="from 01_digits/train.py")
    parser.add_argument("--out", type=Path, required=True, help="folder for the three .npz files")
    arguments = parser.parse_args()
    matcher = Matcher()
    matcher.load_state_dict(load_file(arguments.checkpoint))
    columns = split_images()[1]
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, sizes in SAMPLES.items():
        np.savez_compressed(arguments.out / name, **sample(columns, *sizes))
    np.savez_compressed(arguments.out / HELD_OUT, **held_out(matcher.eval(), held_out_batches(columns)))


if __name__ == "__main__":
    main()
