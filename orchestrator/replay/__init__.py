"""Other programs' logs, turned into the same events and figures."""
