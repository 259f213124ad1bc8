"""Checkpoints as they are stored: the files, and where in them the layer stands."""
