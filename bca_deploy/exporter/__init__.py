"""From a checkpoint to a bundle, or to nothing at all."""
