"""Tokenizer, UTF-8-safe detokenizer and chat templates."""
