"""Model cards: what each folder says of itself, and what people wrote around it."""
