"""Choosing the next token from logits: in MLX for a batch, in NumPy (``host``) for one row."""
