"""A repair as a small file."""
