"""Checked arrays in, outputs out, on any backend."""
