"""The llama.cpp backend: every host that MLX does not serve, and every GGUF file that it cannot run."""
