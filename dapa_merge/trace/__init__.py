"""Looking into a model: which of its units refusing depends on."""
