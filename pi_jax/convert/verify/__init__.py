"""Verifies a finished conversion with code that is independent of the writers."""
