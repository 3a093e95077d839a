"""GGUF: reader, writer, block types, names, configuration and vocabulary."""
