"""The built-in demo model: its text, its training script, its weights."""
