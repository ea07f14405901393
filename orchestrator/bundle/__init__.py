"""Bundles: what strangers need to check a run's figures, in one file."""
