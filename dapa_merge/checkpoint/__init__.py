"""Models on disk. Imports no torch."""
