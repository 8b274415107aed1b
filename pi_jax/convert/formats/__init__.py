"""Readers and writers of weight files: one module per format."""
