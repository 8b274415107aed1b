"""The LLaMA transformer, its attention backends and its loss."""

from pi_jax.model.llama import Block, Llama, RMSNorm, abstract, parameter_axes

__all__ = ["Block", "Llama", "RMSNorm", "abstract", "parameter_axes"]
