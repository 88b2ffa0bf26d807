"""lorasb.toml, and the verbs over all of its tasks."""
