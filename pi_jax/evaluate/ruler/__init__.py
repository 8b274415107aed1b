"""RULER: synthetic long-context tasks and the effective length."""

from pi_jax.evaluate.ruler.command import main

__all__ = ["main"]
