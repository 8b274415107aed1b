"""Checkpoints: written in the background, fingerprinted, and verified when they are read."""

from pi_jax.checkpoint.layerwise import Weights, WeightsWriter
from pi_jax.checkpoint.manager import Checkpoints
from pi_jax.checkpoint.storage import is_folder

__all__ = ["Checkpoints", "Weights", "WeightsWriter", "is_folder"]
