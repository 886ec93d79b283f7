"""The search for the few units that are needed."""
