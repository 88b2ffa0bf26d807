"""The formula, the layers that compute it, and how they come into a model and out of it."""
