"""Is the exported model the same function? Cases, truth, measure, verdict."""
