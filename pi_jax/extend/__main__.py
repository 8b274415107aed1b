"""`python -m pi_jax.extend`: fine-tunes a model for a longer window and proves the result."""

from collections.abc import Sequence

import tyro

from pi_jax import cli


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command with the arguments of the command line."""

    def command() -> None:
        from pi_jax.extend.extension import Extend, extend  # says in one sentence that matplotlib is missing

        extend(tyro.cli(Extend, prog="python -m pi_jax.extend", args=argv))

    cli.run(command)


if __name__ == "__main__":
    main()
