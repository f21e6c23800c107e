"""Attention heads: what they attend to, what they write, and whether the model needs them."""
