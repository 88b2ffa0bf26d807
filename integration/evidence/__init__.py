"""Is LoRA-SB as good as LoRA, and what does sharing a basis cost? Training runs, kept as lines of docs/results/."""
