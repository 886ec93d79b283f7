"""Models that are kept in another form than shards of safetensors under the standard names, and are made into that."""
