"""Causal attention for packed long sequences: one function, several backends, one judge."""

from pi_jax.model.attention.api import IMPLEMENTATIONS, attention

__all__ = ["IMPLEMENTATIONS", "attention"]
