"""Keeps MLflow at the state of the run log: the only package that uses MLflow."""
