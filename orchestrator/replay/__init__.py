"""Other programs' logs, read back into this one's events."""
