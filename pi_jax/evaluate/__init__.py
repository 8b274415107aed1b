"""Proof that a longer window is used."""
