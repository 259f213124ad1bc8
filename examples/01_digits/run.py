"""Export the matcher's fusion layer and run the held-out pairs through it: PyTorch against ONNX Runtime."""

import argparse
import sys
from pathlib import Path

import onnxruntime
import torch
from data import Pairs, held_out_batches, split_images
from model import Matcher
from safetensors.torch import load_file
from torch import Tensor
from train import CHECKPOINT, accuracy, logits, report, train_into

import bca_deploy

_HERE = Path(__file__).resolve().parent


class OnnxFusion:
    """The exported layer, called like the trained one."""

    def __init__(self, model: Path) -> None:
        self.session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])

    def __call__(self, x: Tensor, context: Tensor, mask: Tensor, context_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Run the layer in ONNX Runtime."""
        inputs = {"x": x, "context": context, "mask": mask, "context_mask": context_mask}
        feed = {name: value.numpy() for name, value in inputs.items()}
        out, context_out = self.session.run(["out", "context_out"], feed)
        return torch.from_numpy(out), torch.from_numpy(context_out)


def load(checkpoint: Path) -> Matcher:
    """Return the matcher of ``checkpoint``, in evaluation mode."""
    matcher = Matcher()
    matcher.load_state_dict(load_file(checkpoint))
    return matcher.eval()


def export_fusion(matcher: Matcher, work: Path) -> OnnxFusion:
    """Export the fusion layer alone, as a bundle in ``work``, and open it."""
    bundle = bca_deploy.export(matcher.fusion, work / "bundle", force=True)
    return OnnxFusion(bundle.directory / bundle.manifest.models[0].file)


def compare(matcher: Matcher, fusion: OnnxFusion, batches: list[Pairs]) -> bool:
    """Print how the exported layer does beside the trained one; return whether every prediction is the same."""
    trained, exported = logits(matcher, batches), logits(matcher, batches, fusion)
    equal = int(((trained > 0) == (exported > 0)).sum())
    print(f"accuracy in PyTorch       {accuracy(trained, batches):.3f}")
    print(f"accuracy, exported layer  {accuracy(exported, batches):.3f}")
    print(f"equal predictions         {equal} of {len(trained)}")
    print(f"largest logit difference  {float((trained - exported).abs().max()):.1e}")
    return equal == len(trained)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", action="store_true", help="train anew into the work folder, about a minute")
    parser.add_argument("--work", type=Path, default=Path("build/01_digits"), help="folder for what is written")
    arguments = parser.parse_args()
    batches = held_out_batches(split_images()[1])
    if arguments.train:
        train_into(arguments.work)
        matcher = load(arguments.work / CHECKPOINT)
    else:
        matcher = load(_HERE / CHECKPOINT)
        report(matcher, batches)
    return 0 if compare(matcher, export_fusion(matcher, arguments.work), batches) else 1


if __name__ == "__main__":
    sys.exit(main())
