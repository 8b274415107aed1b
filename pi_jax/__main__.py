"""`python -m pi_jax`, the same as `pi-jax`."""

from pi_jax.cli import main

main()
