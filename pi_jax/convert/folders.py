"""Folders of models, here or on remote storage: whole or not there, and the files beside the weights.

Paths are `etils.epath.Path`: beside local folders these are `gs://`, `s3://` and `az://` addresses, if the client of
that storage is installed (`pip install gcsfs`, `s3fs`, `adlfs`).
"""

import contextlib
import errno
import json
import secrets
import shutil
from collections.abc import Iterator
from typing import Any

from etils import epath

from pi_jax.data.tokenizer import TOKENIZER_FILES
from pi_jax.errors import InputError

GENERATION_FILE = "generation_config.json"


def is_remote(path: Any) -> bool:
    """Whether a path is an address on remote storage."""
    return "://" in str(path)


def read_json(path: Any) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
      InputError: if the file is missing or holds something else.
    """
    try:
        value = json.loads(epath.Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a {type(value).__name__}: it must be a JSON object")
    return value


def write_json(path: epath.Path, value: dict[str, Any]) -> None:
    """Writes a JSON object as people read it."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def require_absent(target: str) -> epath.Path:
    """The path of a folder that is to be made, which must not exist yet."""
    path = epath.Path(target)
    if path.exists():
        raise InputError(f"{target} already exists: remove it or choose another name")
    return path


@contextlib.contextmanager
def new_folder(target: str) -> Iterator[epath.Path]:
    """A temporary folder beside `target` that becomes it if the body succeeds and vanishes if not."""
    path = require_absent(target)
    temporary = path.parent / f".{path.name}-{secrets.token_hex(4)}"
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{target} cannot be made: {error.strerror or error}") from None
    try:
        yield temporary
        temporary.rename(path)
    except OSError as error:
        if isinstance(error, FileExistsError) or error.errno == errno.ENOTEMPTY:
            raise InputError(f"{target} was made by something else meanwhile: nothing was written over it") from None
        raise InputError(f"{target} cannot be written: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            if temporary.exists():
                temporary.rmtree()


def copy_files(source: Any, target: Any, window: int | None = None) -> None:
    """Copies tokenizer and generation settings byte for byte, but for `model_max_length`, which becomes `window`."""
    for name in (*TOKENIZER_FILES, GENERATION_FILE):
        file, copy = epath.Path(source) / name, epath.Path(target) / name
        if not file.is_file():
            continue
        if name == "tokenizer_config.json" and window:
            write_json(copy, read_json(file) | {"model_max_length": window})
        else:
            with file.open("rb") as original, copy.open("wb") as written:
                shutil.copyfileobj(original, written)


def has_tokenizer(folder: Any) -> bool:
    """Whether a folder holds a tokenizer that transformers loads."""
    return any((epath.Path(folder) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
