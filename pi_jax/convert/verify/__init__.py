"""Checks of a finished conversion by code that the writers don't use."""
