"""Train the matcher, print its held-out accuracy and the controls, and write checkpoint and sample."""

import argparse
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from data import Pairs, held_out_batches, pad, pad_pairs, pair_up, shuffle_context, split_images
from model import Fusion, Matcher
from safetensors.torch import save_file
from torch import Generator, Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

CHECKPOINT = "matcher.safetensors"
SAMPLE = "sample.npz"
_EPOCHS = 100
_BATCH = 64  # images: twice as many pairs
_LEARNING_RATE = 2e-3
_NOISE = 0.1  # of the pixel range; without it the matcher learns the training images by heart


def train(columns: Tensor, epochs: int = _EPOCHS, seed: int = 0) -> Matcher:
    """Return a matcher trained on ``columns``, in evaluation mode."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    matcher = Matcher().train()
    optimizer = torch.optim.AdamW(matcher.parameters(), lr=_LEARNING_RATE, weight_decay=0.05)
    steps = epochs * len(columns.split(_BATCH))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=steps, pct_start=0.1)
    for _ in range(epochs):
        for rows in torch.randperm(len(columns), generator=generator).split(_BATCH):
            optimizer.zero_grad()
            _loss(matcher, columns[rows], generator).backward()
            optimizer.step()
            schedule.step()
    return matcher.eval()


def _loss(matcher: Matcher, columns: Tensor, generator: Generator) -> Tensor:
    left, right, label = pair_up(columns, generator)
    left = left + _NOISE * torch.randn(left.shape, generator=generator)
    right = right + _NOISE * torch.randn(right.shape, generator=generator)
    pairs = pad_pairs(left, right, label, generator)
    return binary_cross_entropy_with_logits(matcher(*pairs[:4]), pairs.label)


@torch.no_grad()
def logits(matcher: Matcher, batches: list[Pairs], fusion: Fusion | None = None) -> Tensor:
    """Return the logits of all pairs, with ``fusion`` in place of the trained layer where given."""
    return torch.cat([matcher(*pairs[:4], fusion=fusion) for pairs in batches])


def accuracy(scores: Tensor, batches: list[Pairs]) -> float:
    """Return the share of pairs whose logit has the sign of their label."""
    label = torch.cat([pairs.label for pairs in batches])
    return float(((scores > 0) == (label > 0)).float().mean())


def no_fusion(x: Tensor, context: Tensor, _mask: Tensor, _context_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Stand in for the layer and let neither side see the other."""
    return torch.zeros_like(x), torch.zeros_like(context)


def without_masks(fusion: Fusion, x: Tensor, context: Tensor, mask: Tensor, context_mask: Tensor) -> tuple[Tensor, ...]:
    """Run ``fusion`` as if the padding were real columns."""
    return fusion(x, context, torch.ones_like(mask), torch.ones_like(context_mask))


def report(matcher: Matcher, batches: list[Pairs]) -> None:
    """Print the held-out accuracy and the controls: the first two are at chance if the layer does the work."""
    generator = torch.Generator().manual_seed(0)
    shuffled = [shuffle_context(pairs, generator) for pairs in batches]
    unmasked = partial(without_masks, matcher.fusion)
    print(f"held-out accuracy         {accuracy(logits(matcher, batches), batches):.3f}")
    print(f"  context shuffled        {accuracy(logits(matcher, shuffled), shuffled):.3f}")
    print(f"  without the layer       {accuracy(logits(matcher, batches, no_fusion), batches):.3f}")
    print(f"  layer without its masks {accuracy(logits(matcher, batches, unmasked), batches):.3f}")


@torch.no_grad()
def sample(matcher: Matcher, columns: Tensor) -> dict[str, np.ndarray]:
    """Return the layer's inputs and outputs for eight padded held-out pairs, four of them matching."""
    generator = torch.Generator().manual_seed(0)
    left, right, _ = pair_up(columns[:4], generator)
    left, mask = pad(left, 2, generator)
    right, context_mask = pad(right, 3, generator)
    x, context = matcher.embed(left, right, mask, context_mask)
    out, context_out = matcher.fusion(x, context, mask, context_mask)
    arrays = {"x": x, "context": context, "mask": mask, "context_mask": context_mask}
    return {name: value.numpy() for name, value in (arrays | {"out": out, "context_out": context_out}).items()}


def train_into(directory: Path, epochs: int = _EPOCHS, seed: int = 0) -> None:
    """Train, report, and write the checkpoint and the sample into ``directory``."""
    # The tensors are so small that two threads gain little, and lose a lot where another process has the core.
    torch.set_num_threads(1)
    columns, held_out = split_images()
    started = time.perf_counter()
    matcher = train(columns, epochs, seed)
    print(f"trained {epochs} epochs, seed {seed}, in {time.perf_counter() - started:.0f} s")
    report(matcher, held_out_batches(held_out))
    directory.mkdir(parents=True, exist_ok=True)
    save_file(matcher.state_dict(), directory / CHECKPOINT)
    np.savez_compressed(directory / SAMPLE, **sample(matcher, held_out))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint and the sample")
    parser.add_argument("--epochs", type=int, default=_EPOCHS)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    train_into(arguments.out, arguments.epochs, arguments.seed)


if __name__ == "__main__":
    main()
