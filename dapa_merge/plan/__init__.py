"""Which tensors of which models a recipe is about, and the arithmetic on them."""
