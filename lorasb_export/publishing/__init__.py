"""Folders → the Hugging Face Hub: what may go out, cards, one commit at a time."""
