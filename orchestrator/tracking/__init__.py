"""Keeps MLflow in the state of the run log: the only package that uses MLflow."""
