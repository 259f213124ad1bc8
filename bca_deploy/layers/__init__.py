"""What is correct: the reference layer, its checkpoints, and its lowered forms."""
