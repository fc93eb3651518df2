"""What really happened, recorded and shown: as a movie, as a trace, on a terminal."""
