"""Creates one page from the result files of several models: `python -m pi_jax.evaluate report`."""

from pi_jax.evaluate.report.command import main as main
