"""Folders → the Hugging Face Hub: what may go out, one commit at a time."""
