"""Sliding-window perplexity."""

from pi_jax.evaluate.perplexity.command import main

__all__ = ["main"]
