"""Base and data → a Basis: gradients summed over rows, their truncated SVD, what it captures."""
