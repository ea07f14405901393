"""Runs trials: the driver's only package that uses Ray."""

import os

# Read when Ray is imported: a call from a thread that has not heard that Ray was left would start another cluster.
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
