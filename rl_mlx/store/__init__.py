"""Model references: from what a user types to files on disk."""
