"""Find keypoints in two photographs and match them in PyTorch; write what the export and the comparison need.

The photographs are scikit-image's stereo pair of a motorcycle, read from its installed files. DISK finds and describes the
keypoints, with the weights that the matcher was trained beside.
"""

import argparse
from pathlib import Path

import numpy as np
import skimage
import torch
from kornia.feature import DISK
from model import Matcher
from numpy.typing import NDArray
from published import weights
from skimage.io import imread
from torch import Tensor

_DATA = Path(skimage.__file__).parent / "data"
_IMAGES = ("motorcycle_left.png", "motorcycle_right.png")
_KEYPOINTS = 1024
# Pairs, keypoints on the left, on the right: no size is the same in both, so all three dimensions show.
_SAMPLES = {"few.npz": (2, 48, 40), "many.npz": (4, 96, 112)}

Arrays = dict[str, NDArray[np.float32]]


@torch.no_grad()
def features(detector: DISK, image: NDArray[np.uint8]) -> tuple[Tensor, Tensor]:
    """Return the best keypoints ``[1, N, 2]`` of an image ``[H, W, 3]``, in pixels, and their descriptors ``[1, N, 128]``."""
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None] / 255
    found = detector(pixels, n=_KEYPOINTS, window_size=5, score_threshold=0.0, pad_if_not_divisible=True)[0]
    best = found.detection_scores.argsort(descending=True)
    return found.keypoints[None, best], found.descriptors[None, best]


def normalised(keypoints: Tensor, image: NDArray[np.uint8]) -> Tensor:
    """Return keypoints from the middle of the image, in halves of its longer side."""
    size = torch.tensor([image.shape[1], image.shape[0]], dtype=keypoints.dtype)
    return (keypoints - size / 2) / (size.max() / 2)


def part(inputs: dict[str, Tensor], pairs: int, left: int, right: int) -> Arrays:
    """Return a sample: the keypoints dealt out to so many pairs of images."""
    lengths = {"0": left, "1": right}
    return {name: t[0, : pairs * lengths[name[-1]]].reshape(pairs, -1, t.shape[-1]).numpy() for name, t in inputs.items()}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the three .npz files")
    out: Path = parser.parse_args().out
    detector = DISK()
    detector.load_state_dict(weights("disk-depth-save.pth")["extractor"])
    images, inputs, pixels = [imread(_DATA / name) for name in _IMAGES], dict[str, Tensor](), {}
    for side, image in enumerate(images):
        keypoints, descriptors = features(detector.eval(), image)
        inputs |= {f"keypoints{side}": normalised(keypoints, image), f"descriptors{side}": descriptors}
        pixels[f"pixels{side}"] = keypoints[0].numpy()
    out.mkdir(parents=True, exist_ok=True)
    for name, sizes in _SAMPLES.items():
        np.savez_compressed(out / name, **part(inputs, *sizes))
    scores = Matcher().eval()(**inputs)
    arrays = {name: tensor.numpy() for name, tensor in (inputs | {"scores": scores}).items()}
    np.savez_compressed(out / "pair.npz", **arrays, **pixels)


if __name__ == "__main__":
    main()
