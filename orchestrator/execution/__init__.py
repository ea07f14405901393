"""Runs trials: the only package that uses Ray."""
