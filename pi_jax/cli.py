"""Entry point and error handling of every command: `pi-jax NAME` is the same as `python -m pi_jax.NAME`."""

import contextlib
import importlib
import importlib.metadata
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterator
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


def require_writable(path: str) -> None:
    """Checks that a result file can be written, before any work is done; an empty path means no file."""
    target = pathlib.Path(path)
    folder = next(p for p in (target.parent, *target.absolute().parents) if p.exists())
    if path and (target.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK)):
        raise InputError(f"{path} cannot be written: it must be a file in a folder that can be written")


@contextlib.contextmanager
def new_file(path: str | pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary file beside `path` that replaces it if the body succeeds."""
    target = pathlib.Path(path)
    temporary = target.with_name(target.name + ".tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(target)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from None


def write_json(path: str, value: Any) -> None:
    """Writes `value` as JSON, atomically; what JSON does not know, as text."""
    with new_file(path) as file:
        file.write_text(json.dumps(value, indent=2, default=str) + "\n")
