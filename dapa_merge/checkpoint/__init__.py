"""Model files on disk: where the units are, reading, copying, proving. Imports no torch by itself."""
