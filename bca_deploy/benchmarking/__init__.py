"""A bundle's session beside what else could run the model: who competes, over which grid, and what came out."""
