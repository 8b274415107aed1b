"""Console output of a command, from process 0 only."""

import functools
import sys

import jax
from tqdm import tqdm


def info(message: str) -> None:
    """Prints a line on stdout."""
    if jax.process_index() == 0:
        print(message, flush=True)


def warn(message: str) -> None:
    """Prints a warning on stderr."""
    if jax.process_index() == 0:
        print(f"warning: {message}", file=sys.stderr, flush=True)


@functools.cache
def note(message: str) -> None:
    """Prints a note on stderr, such as how an ambiguous file was read; a repetition is not printed."""
    if jax.process_index() == 0:
        print(f"note: {message}", file=sys.stderr, flush=True)


def progress(total: int, what: str, unit: str, disable: bool = False) -> tqdm:
    """A progress bar on stderr: on a terminal it moves, a log file gets a line now and then."""
    seconds = 0.5 if sys.stderr.isatty() else 60
    disable = disable or jax.process_index() > 0
    return tqdm(total=total, desc=what, unit=unit, unit_scale=total > 10_000, disable=disable, mininterval=seconds)
