"""The real scheduler with no model: `python -m nanopaged.simulate`."""
