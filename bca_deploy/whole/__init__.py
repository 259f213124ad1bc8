"""A whole model: what it takes, the layers found in it, proven and swapped, and its truth."""
