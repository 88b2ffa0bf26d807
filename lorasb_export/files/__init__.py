"""Files on this disk: read strictly, written whole or not at all, by one writer at a time."""
