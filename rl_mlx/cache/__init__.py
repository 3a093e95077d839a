"""The KV cache: one arena of left-aligned rows."""
