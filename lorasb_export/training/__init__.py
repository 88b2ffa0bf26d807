"""Data and a basis → adapter folders: the loop, its settings, its working folder and its record."""
