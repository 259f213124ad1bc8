"""Match the two photographs with the bundle, without torch; compare with PyTorch's matches and with the measured disparity."""

import argparse
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import skimage
from numpy.typing import NDArray
from skimage.io import imread

import bca_deploy

_DATA = Path(skimage.__file__).parent / "data"
_IMAGES = ("motorcycle_left.png", "motorcycle_right.png")
_INPUTS = ("keypoints0", "descriptors0", "keypoints1", "descriptors1")
# The least probability of a match, as LightGlue has it.
_THRESHOLD = 0.1

Floats = NDArray[np.float32]


def matches(scores: Floats) -> NDArray[np.intp]:
    """Return which keypoints ``[K, 2]`` are each other's best, by the logarithms of an assignment ``[N + 1, M + 1]``."""
    pairs = scores[:-1, :-1]
    best, best_back = pairs.argmax(1), pairs.argmax(0)
    every = np.arange(len(best))
    kept = (best_back[best] == every) & (pairs[every, best] > np.log(_THRESHOLD))
    return np.stack([every[kept], best[kept]], axis=1)


def measured(left: Floats) -> Floats:
    """Return how far keypoints ``[K, 2]`` of the left photograph are to the left in the right one; NaN where nobody knows."""
    with np.load(_DATA / "motorcycle_disp.npz") as file:
        disparity = file["arr_0"]
    column, line = np.rint(left).astype(int).T
    return np.where(np.isfinite(disparity), disparity, np.nan)[line, column]


def draw_matches(left: Floats, right: Floats, path: Path) -> None:
    """Draw lines from keypoint to keypoint over the photographs, coloured by how far they move: what is near is red."""
    images = [imread(_DATA / name) for name in _IMAGES]
    shift, moved = images[0].shape[1], (left - right)[:, 0]
    figure, axes = plt.subplots(figsize=(12, 4.1), layout="constrained")
    axes.imshow(np.concatenate(images, axis=1))
    for (x0, y0), (x1, y1), color in zip(left, right, plt.colormaps["turbo"](moved / moved.max()), strict=True):
        axes.plot([x0, x1 + shift], [y0, y1], color=color, linewidth=0.4, marker=".", markersize=2)
    axes.set_axis_off()
    figure.savefig(path, dpi=120)


def draw_disparity(left: Floats, right: Floats, true: Floats, path: Path) -> None:
    """Draw matched keypoints of the left photograph, coloured by how far they move; beside them how far they should."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 3.6), sharey=True, layout="constrained")
    for axes, title, moved in zip(panels, ("by the matches", "as measured"), ((left - right)[:, 0], true), strict=True):
        points = axes.scatter(*left.T, c=moved, s=8, cmap="turbo", vmin=0, vmax=70)
        axes.set(title=f"disparity {title}", aspect="equal")
    panels[0].invert_yaxis()
    figure.colorbar(points, ax=panels, label="pixels")
    figure.savefig(path, dpi=80)


def compare(session: bca_deploy.Session, pair: Path) -> bool:
    """Print how the bundle does beside PyTorch and the disparity; return whether the matches are the same."""
    with np.load(pair) as file:
        arrays = dict(file)
    trained = matches(arrays["scores"][0])
    exported = matches(session(**{name: arrays[name] for name in _INPUTS})[0][0])
    left, right = arrays["pixels0"][exported[:, 0]], arrays["pixels1"][exported[:, 1]]
    true = measured(left)
    off = np.hypot((left - right)[:, 0] - true, (left - right)[:, 1])
    known = off[np.isfinite(off)]
    draw_matches(left, right, pair.with_name("matches.jpg"))
    draw_disparity(left, right, true, pair.with_name("disparity.png"))
    print(f"matches in PyTorch        {len(trained)}")
    print(f"the same in the bundle    {len(set(map(tuple, trained)) & set(map(tuple, exported)))} of {len(exported)}")
    print(f"median error              {np.median(known):.2f} pixels, of {len(known)} where the disparity is known")
    print(f"within 2 pixels           {(known < 2).mean():.0%}")
    print(f"torch was imported        {'yes' if 'torch' in sys.modules else 'no'}")
    return np.array_equal(trained, exported)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument(
        "--pair", type=Path, default=Path("build/03_lightglue/pair.npz"), help="from sample.py; pictures go beside it"
    )
    arguments = parser.parse_args()
    with bca_deploy.open(arguments.bundle) as session:
        return 0 if compare(session, arguments.pair) else 1


if __name__ == "__main__":
    sys.exit(main())
