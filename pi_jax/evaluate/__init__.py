"""Evaluations that measure whether a model uses its extended window."""
