"""The decoder in MLX: attention, rope, norms, mlp, moe, and one small file per family."""
