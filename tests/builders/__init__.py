"""What several tests build: logs, run folders, trials, projects with bad input, and benches for faults."""
