"""How every command starts and ends: `python -m pi_jax.NAME` and `pi-jax NAME` are the same."""

import importlib
import json
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

from pi_jax.errors import InputError

COMMANDS = {
    "prepare": "text to tokens",
    "plan": "will it fit? compiled for devices that are not here",
    "train": "fine-tune with a longer window",
    "evaluate": "prove the window: perplexity, passkey, RULER, standard benchmarks, summaries; a report",
    "generate": "text from a model",
    "convert": "weights in and out: Hugging Face and Meta folders, pi_jax runs",
    "theory": "the paper's bounds and figures, checked; a model's attention scores, measured",
}


def run(command: Callable[[], Any]) -> None:
    """Runs a command; bad input becomes one sentence on stderr and exit status 2, without a traceback."""
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
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        module = "pi_jax.prepare" if argv[0] == "prepare" else f"pi_jax.{argv[0]}.__main__"
        importlib.import_module(module).main(argv[1:])
        return
    print("usage: pi-jax COMMAND [--help]\n\n" + "\n".join(f"  {k:10} {v}" for k, v in COMMANDS.items()))
    if argv and argv[0] not in ("-h", "--help"):
        sys.exit(_fail(f"{argv[0]!r} is no command: choose one of {', '.join(COMMANDS)}"))


def require_writable(path: str) -> None:
    """Checks, before any work, that a result file can be written; an empty path is none."""
    target = pathlib.Path(path)
    folder = next(p for p in (target.parent, *target.absolute().parents) if p.exists())
    if path and (target.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK)):
        raise InputError(f"{path} cannot be written: it must be a file in a folder that can be written")


def write_json(path: str, value: Any) -> None:
    """Writes `value` as JSON by way of a temporary file, so that a reader never sees half of it."""
    target = pathlib.Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(target.name + ".tmp")
        temporary.write_text(json.dumps(value, indent=2) + "\n")
        os.replace(temporary, target)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from None
