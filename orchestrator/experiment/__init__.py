"""What is asked: the experiment file, its trials, and where their workers go."""
