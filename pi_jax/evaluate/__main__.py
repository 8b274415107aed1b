"""`python -m pi_jax.evaluate WHAT`."""

import sys
from collections.abc import Sequence

from pi_jax.evaluate import passkey, perplexity, ruler

WHAT = {"perplexity": perplexity.main, "passkey": passkey.main, "ruler": ruler.main}


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: the first word says what to evaluate."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in WHAT:
        WHAT[argv[0]](argv[1:])
        return
    print(f"usage: python -m pi_jax.evaluate {{{','.join(WHAT)}}} [--help]")
    if argv not in (["-h"], ["--help"]):
        what = f"{argv[0]!r} cannot be evaluated" if argv else "say what to evaluate"
        print(f"error: {what}: choose one of {', '.join(WHAT)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
