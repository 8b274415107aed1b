"""The whole journey in one command: `pi-jax extend`."""
