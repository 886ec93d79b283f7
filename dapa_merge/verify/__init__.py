"""Proves that a result is the target plus exactly its selection."""
