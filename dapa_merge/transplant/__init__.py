"""Writes a selection into a copy of the target."""
