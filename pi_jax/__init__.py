"""Extends the context window of LLaMA-family models by Position Interpolation, in JAX."""

__version__ = "0.1.0"
