"""Everything in one command: `pi-jax extend`."""
