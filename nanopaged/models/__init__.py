"""Weights and text: a model written by hand, checkpoints, and the tokenizer."""
