"""What the proof of a result is made of: its tensors beside those they should be, and its files beside its manifest."""
