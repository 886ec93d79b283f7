"""Measuring a model: how often it refuses, what it still knows, and swapping units in and out of it."""
