"""Patches: the small file of what a result changed, applied to a copy or in place, and taken back."""
