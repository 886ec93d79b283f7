"""The study `dapa-merge compare`: methods side by side on the same targets."""
