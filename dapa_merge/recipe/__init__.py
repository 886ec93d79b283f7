"""Recipes: the YAML file that mergekit and dapa-merge share."""
