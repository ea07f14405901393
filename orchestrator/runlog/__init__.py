"""A run's folder: every event of the run, written and read back."""
