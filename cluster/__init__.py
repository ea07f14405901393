"""What a cluster needs besides the program: its tracking server and the environment of its jobs."""
