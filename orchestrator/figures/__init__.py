"""What is measured: pure functions of events."""
