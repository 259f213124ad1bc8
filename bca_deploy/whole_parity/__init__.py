"""A whole model tried out: what its inputs mean, its float64 truth, and whether a graph is the same function."""
