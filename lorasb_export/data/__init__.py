"""A task: its rows, from a file, a folder or the Hub, to batches of token ids with labels."""
