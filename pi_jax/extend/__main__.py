"""`python -m pi_jax.extend`: fine-tunes a model for a longer window and proves the result."""

from collections.abc import Sequence

import tyro

from pi_jax import cli
from pi_jax.extend.extension import Extend, extend


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command with the arguments of the command line."""
    cli.run(lambda: extend(tyro.cli(Extend, prog="python -m pi_jax.extend", args=argv)))


if __name__ == "__main__":
    main()
