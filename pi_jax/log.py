"""Console output of a command, from process 0 only."""

import jax


def info(message: str) -> None:
    """Prints a line on stdout."""
    if jax.process_index() == 0:
        print(message, flush=True)
