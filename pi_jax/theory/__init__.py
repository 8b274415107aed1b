"""Checks and plots the bounds of the Position Interpolation paper, and measures the attention scores of a model."""
