"""Measures models: refusal, perplexity, skills."""
