"""What crosses the process boundary between driver and workers; standard library only."""
