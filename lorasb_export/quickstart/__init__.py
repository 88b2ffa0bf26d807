"""`lorasb quickstart`: the whole line on a small real model."""
