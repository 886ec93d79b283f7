"""Prompt sets: packaged, from files and folders, and from the Hub."""
