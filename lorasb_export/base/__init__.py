"""The frozen base model: found, fingerprinted, loaded."""
