"""Methods beside each other: what each makes of the same target, on the same prompts."""
