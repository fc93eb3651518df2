"""What does it cost, and how far is that from the floor? `python -m nanopaged.bench` lists the commands."""
