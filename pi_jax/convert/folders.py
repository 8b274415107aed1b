"""Files of model folders on local or remote storage: JSON and tokenizer files.

Paths are `etils.epath.Path`: local folders, or `gs://`, `s3://` and `az://` URLs if the client of that storage is
installed (`pip install gcsfs`, `s3fs`, `adlfs`).
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from typing import Any

from etils import epath

from pi_jax import limits
from pi_jax.data.tokenizer import TOKENIZER_FILES
from pi_jax.errors import InputError
from pi_jax.files import require_own

GENERATION_FILE = "generation_config.json"
"""File with the generation settings of a Hugging Face folder."""

EARLIER = "configs"
"""Subfolder with the earlier versions of a run's config.json, 1.json first."""
_PIECE = 2**20


def read_json(path: Any) -> dict[str, Any]:
    """Reads a JSON object from a file.

    Raises:
      InputError: if the file is missing, is no JSON object, is too large, or is a link out of its folder.
    """
    require_own(path, limits.JSON)
    try:
        value = json.loads(epath.Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file") from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, no JSON, or a number too long
        raise InputError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} contains a {type(value).__name__}: it must contain a JSON object")
    return value


def write_json(path: epath.Path, value: dict[str, Any]) -> None:
    """Writes a JSON object with indentation."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_files(source: Any, target: Any, window: int | None = None) -> None:
    """Copies tokenizer files and generation settings unchanged, except that `model_max_length` becomes `window`.

    Raises:
      InputError: if one of them is a link out of the folder, or too large.
    """
    for name in (*TOKENIZER_FILES, GENERATION_FILE):
        file, copy = epath.Path(source) / name, epath.Path(target) / name
        require_own(file, limits.TOKENIZER)
        if not file.is_file():
            continue
        if name == "tokenizer_config.json" and window:
            write_json(copy, read_json(file) | {"model_max_length": window})
        else:
            with file.open("rb") as original, copy.open("wb") as written:
                shutil.copyfileobj(original, written)


def has_tokenizer(folder: Any) -> bool:
    """Whether a folder contains a tokenizer that transformers can load."""
    return any((epath.Path(folder) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))


def digest(files: Sequence[epath.Path]) -> str:
    """SHA-256 of the sizes of files and of a MiB at the start, in the middle and at the end of each.

    It tells models apart without reading all of their weights.
    """
    found = hashlib.sha256()
    for path in files:
        size = path.stat().length
        found.update(f"{size} ".encode())
        with path.open("rb") as file:
            for start in (0, size // 2, max(0, size - _PIECE)):
                file.seek(start)
                found.update(file.read(_PIECE))
    return found.hexdigest()
