"""Tells refusals from answers. Standard library only."""
