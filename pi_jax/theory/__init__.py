"""The paper's bounds, checked and plotted, and a model's attention scores, measured."""
