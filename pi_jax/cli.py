"""Entry point and error handling of every command: `pi-jax NAME` is the same as `python -m pi_jax.NAME`."""

import importlib
import importlib.metadata
import os
import sys
from collections.abc import Callable
from typing import Any

from pi_jax import __version__, dependencies
from pi_jax.errors import InputError

COMMANDS = {
    "prepare": "tokenize text into a token store",
    "plan": "will it fit? memory of a train step, compiled for hardware you don't have",
    "train": "fine-tune with a longer window",
    "evaluate": "perplexity, passkey retrieval, RULER, standard benchmarks, summarization, and a report",
    "generate": "generate text from a model",
    "extend": "everything in one command: tokenize, fine-tune, evaluate, report, export",
    "convert": "convert weights between Hugging Face folders, Meta folders and pi_jax checkpoints",
    "theory": "check the paper's bounds, plot its figures, measure a model's attention scores",
}


def run(command: Callable[[], Any]) -> None:
    """Runs a command. Bad input prints one sentence on stderr and exits with status 2, without a traceback."""
    try:
        command()
    except InputError as error:
        sys.exit(_fail(str(error)))
    except FloatingPointError as error:  # the run itself failed; its input was fine
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has gone, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def main(argv: list[str] | None = None) -> None:
    """`pi-jax COMMAND ...`."""
    dependencies.require()
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        module = "pi_jax.prepare" if argv[0] == "prepare" else f"pi_jax.{argv[0]}.__main__"
        importlib.import_module(module).main(argv[1:])
        return
    if argv == ["--version"]:
        print(f"pi_jax {__version__}, jax {importlib.metadata.version('jax')}")
        return
    print("usage: pi-jax COMMAND [--help] | --version\n\n" + "\n".join(f"  {k:10} {v}" for k, v in COMMANDS.items()))
    if argv and argv[0] not in ("-h", "--help"):
        sys.exit(_fail(f"{argv[0]!r} is not a command: choose one of {', '.join(COMMANDS)}"))
