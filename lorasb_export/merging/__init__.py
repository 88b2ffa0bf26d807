"""Base + adapters → a plain model folder, written block by block and resumable."""
