"""`python -m pi_jax.train`."""

from collections.abc import Sequence

from pi_jax import cli
from pi_jax.config import parse
from pi_jax.parallel import processes
from pi_jax.train.loop import train


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""

    def command():
        config, base = parse(argv)
        processes.initialize()
        train(config, base)

    cli.run(command, connect=processes.connect)


if __name__ == "__main__":
    main()
