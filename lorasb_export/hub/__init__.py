"""What lies on the Hub, as a folder on this disk."""
