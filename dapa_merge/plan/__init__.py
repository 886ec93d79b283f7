"""The tensors that a recipe changes, and the arithmetic on them."""
