"""A model becomes figures: refusal, perplexity, skills."""
