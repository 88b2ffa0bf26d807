"""Questions asked of a base and its adapters, and their answers scored."""
