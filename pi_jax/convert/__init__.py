"""Weights in and out: the only place that knows other people's names."""
