"""Models that torch.export.save wrote: read without the code that made them, their layers called as they were."""
