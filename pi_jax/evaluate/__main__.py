"""`python -m pi_jax.evaluate WHAT`: runs an evaluation."""

import importlib
import sys
from collections.abc import Sequence

from pi_jax import cli
from pi_jax.errors import InputError
from pi_jax.parallel import processes

WHAT = {
    "perplexity": "sliding-window perplexity on text, by token, by window and by document",
    "passkey": "maximum distance at which a number in the input is found (the paper's Table 4), and a heat map",
    "ruler": "the synthetic RULER tasks, and the effective length",
    "harness": "lm-evaluation-harness: the paper's Table 5 and any other of its tasks",
    "summarization": "ROUGE of summaries of long documents: GovReport as in the paper's Table 6",
    "report": "one page of tables and figures from the result files of several models",
}
"""Name of each evaluation -> its description."""
_EXTRA = ("lm_eval", "rouge_score")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the evaluation that the first argument names."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in WHAT:

        def command():
            module = _module(argv[0])
            if not {"-h", "--help"} & set(argv) and argv[0] != "report":
                processes.initialize()
            module.main(argv[1:])

        cli.run(command)
        return
    print("usage: python -m pi_jax.evaluate WHAT [--help]\n\n" + "\n".join(f"  {k:14} {v}" for k, v in WHAT.items()))
    if argv not in (["-h"], ["--help"]):
        what = f"there is no evaluation {argv[0]!r}" if argv else "the name of the evaluation is missing"
        print(f"error: {what}: choose one of {', '.join(WHAT)}", file=sys.stderr)
        sys.exit(2)


def _module(what: str):
    try:
        return importlib.import_module(f"pi_jax.evaluate.{what}")
    except ModuleNotFoundError as error:
        if error.name in _EXTRA:
            raise InputError(f"evaluate {what} needs {error.name}: pip install 'pi_jax[eval]'") from None
        raise


if __name__ == "__main__":
    main()
