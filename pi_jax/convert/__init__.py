"""Reads and writes model weights in the formats of Hugging Face, Meta and pi_jax."""
