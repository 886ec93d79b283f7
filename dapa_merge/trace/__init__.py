"""The study `dapa-merge trace`: where alignment lives in a model."""
