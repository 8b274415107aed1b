"""Entry point and error handling of every command: `pi-jax NAME` is the same as `python -m pi_jax.NAME`."""

import importlib
import importlib.metadata
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, NoReturn

from pi_jax import __version__, dependencies
from pi_jax.errors import InputError
from pi_jax.parallel import ending

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


def run(command: Callable[[], Any], connect: Callable[[], Any] | None = None) -> None:
    """Runs a command. Bad input prints one sentence on stderr and exits with status 2, without a traceback.

    Args:
      command: the command. If it is connected to other processes, they end too, with the same status and sentence.
      connect: connects to them, for an error that the command meets before it does so itself.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminated)
    try:
        command()
    except InputError as error:
        ending.end(2, str(error), connect=connect)
    except FloatingPointError as error:  # the run itself failed; its input was fine
        ending.end(1, str(error))
    except KeyboardInterrupt:
        ending.end(130, "interrupted", show=lambda: print("interrupted", file=sys.stderr))
    except BrokenPipeError:  # the reader of our output has gone, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        ending.end(141, "the reader of the output has gone", show=lambda: None)
    except OSError as error:  # a full disk, missing permissions, a folder in the place of a file
        where = f"{error.filename}: " if error.filename else ""
        ending.end(2, f"{where}{error.strerror or error}")


def _terminated(*_: object) -> NoReturn:
    """Handles SIGTERM: what is half written is removed, as by any exception."""
    sys.exit(128 + signal.SIGTERM)


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
        ending.end(2, f"{argv[0]!r} is not a command: choose one of {', '.join(COMMANDS)}")
