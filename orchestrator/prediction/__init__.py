"""Predicts throughput, time and cost at sizes that were not run, from a short calibration."""
