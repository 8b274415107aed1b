"""Causal attention for packed long sequences: one function, several backends, one reference."""

from pi_jax.model.attention.api import IMPLEMENTATIONS, attention

__all__ = ["IMPLEMENTATIONS", "attention"]
