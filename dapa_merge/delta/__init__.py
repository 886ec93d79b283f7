"""Delta debugging. Standard library only; knows nothing of models."""
