"""Names the damage to a target from its weights and its source's, without loading a model."""
