"""Whole models as what a bundle's models are made from: with their code, or from the traces that a bundle keeps."""
