"""Half-image pairs from scikit-learn's bundled digits, as blank-padded sequences of pixel columns."""

from typing import NamedTuple

import torch
from torch import Generator, Tensor

HALF = 4  # columns in either half of an 8x8 image
PIXELS = 8  # pixels in a column
MAX_PADDING = 3
HELD_OUT = 450  # of 1797 images
_SPLIT_SEED = 0
_PAIR_SEED = 0


class Pairs(NamedTuple):
    """Left halves, right halves, and whether each two are of one image; masks are true on real columns."""

    left: Tensor
    right: Tensor
    left_mask: Tensor
    right_mask: Tensor
    label: Tensor


def split_images() -> tuple[Tensor, Tensor]:
    """Return the training and the held-out images, each ``[N, column, pixel]`` in 0 to 1.

    The images are split before any pair is made, so that no held-out half was ever seen in training.
    """
    from sklearn.datasets import load_digits  # here: the model itself, which takes its sizes from this module, needs none

    images = torch.from_numpy(load_digits().images).float() / 16
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    columns = images.transpose(1, 2)[order]
    return columns[HELD_OUT:], columns[:HELD_OUT]


def pair_up(columns: Tensor, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return left halves, right halves and labels: every image with itself, then every image with another.

    Each half occurs once in either class, so nothing about one half alone tells the label.
    """
    left, right = columns[:, :HALF], columns[:, HALF:]
    shift = int(torch.randint(1, len(columns), (), generator=generator))
    label = torch.cat([torch.ones(len(columns)), torch.zeros(len(columns))])
    return torch.cat([left, left]), torch.cat([right, right.roll(shift, 0)]), label


def pad(columns: Tensor, padding: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Put each half at a random place among ``padding`` blank columns; return the columns and their mask."""
    batch = len(columns)
    start = torch.randint(0, padding + 1, (batch, 1), generator=generator)
    place = start + torch.arange(HALF)
    padded = torch.zeros(batch, HALF + padding, PIXELS)
    padded.scatter_(1, place[..., None].expand(-1, -1, PIXELS), columns)
    mask = torch.zeros(batch, HALF + padding, dtype=torch.bool).scatter_(1, place, True)
    return padded, mask


def pad_pairs(left: Tensor, right: Tensor, label: Tensor, generator: Generator) -> Pairs:
    """Pad both sides of a batch, each by its own random number of columns."""
    left_padding, right_padding = torch.randint(0, MAX_PADDING + 1, (2,), generator=generator).tolist()
    left, left_mask = pad(left, left_padding, generator)
    right, right_mask = pad(right, right_padding, generator)
    return Pairs(left, right, left_mask, right_mask, label)


def held_out_batches(columns: Tensor, size: int = 90) -> list[Pairs]:
    """Return the same pairs in the same padded batches at every call."""
    generator = torch.Generator().manual_seed(_PAIR_SEED)
    left, right, label = pair_up(columns, generator)
    order = torch.randperm(len(label), generator=generator)
    return [pad_pairs(left[rows], right[rows], label[rows], generator) for rows in order.split(size)]


def shuffle_context(pairs: Pairs, generator: Generator) -> Pairs:
    """Deal the right halves out anew within the batch and leave the labels: they now say nothing."""
    order = torch.randperm(len(pairs.label), generator=generator)
    return pairs._replace(right=pairs.right[order], right_mask=pairs.right_mask[order])
