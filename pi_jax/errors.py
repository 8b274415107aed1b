"""The one exception for anything a user can put right, and sentences that several messages share."""

import pathlib
import re
from collections.abc import Sequence
from typing import Any


class InputError(ValueError):
    """Bad input: a file, a field or a flag. The message is one sentence that names the file or
    field, the value found and what would be right; commands print it and exit with status 2."""


LFS_BYTES = 1024
"""A Git LFS pointer is smaller."""


def require_downloaded(path: Any, data: bytes) -> None:
    """Checks that the content of a file is not what Git LFS puts in the place of one that it did not download."""
    if re.fullmatch(rb"version https://git-lfs.*\n(ext-.*\n)*oid .*\nsize \d+\s*", data):
        raise InputError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` to download it")


def some(names: Sequence[str]) -> str:
    """The first three of several names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def no_folder(path: str) -> InputError:
    """The error for a missing model or tokenizer folder; says how to download it if `path` may be a name on the Hub."""
    message = f"{path}: there is no such folder"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not pathlib.Path(path).parent.exists():
        name = path.split("/")[1]
        message += (
            f"; to use a model of the Hugging Face Hub, download it: hf download {path} --local-dir models/{name}"
        )
    return InputError(message)
