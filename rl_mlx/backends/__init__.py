"""Backends: what makes tokens (MLX, llama.cpp, a fake for tests)."""
