"""Reads the manifest of a token store. Every field is checked, because a store can be damaged or made by others."""

import json
import pathlib
import re
from collections.abc import Callable
from typing import Any

from pi_jax.errors import InputError

FORMAT = 1
"""Version of the format, stored in the manifest."""

LARGEST_VOCABULARY = 2**31
"""Token ids are int32 when they are read."""


def parse(path: str, data: bytes) -> dict[str, Any]:
    """Returns the content of a manifest.json.

    Args:
      path: the token store, for messages.
      data: the file.

    Raises:
      InputError: if the file is not a manifest, has another format, or a field is missing or has an impossible value.
    """
    try:
        manifest = json.loads(data)
        version = manifest["format"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InputError(f"{path} is not a token store: pi_jax.prepare did not write its manifest.json") from None
    if type(version) is not int or version != FORMAT:
        raise InputError(
            f"{path} is a token store of format {version!r:.40}, but this version of pi_jax reads format {FORMAT}: "
            "prepare it again"
        )
    for name, (fits, wanted) in _FIELDS.items():
        section, _, key = name.rpartition(".")
        found = manifest[section] if section else manifest
        if key not in found and key in _OPTIONAL:
            continue
        if key not in found or not fits(found[key]):
            value = f"{found[key]!r:.80}" if key in found else "missing"
            raise damaged(path, f"{name} in its manifest.json is {value}, but must be {wanted}")
    vocabulary = manifest["tokenizer"]["vocab_size"]
    largest = manifest.setdefault("largest_token", vocabulary - 1)
    if largest >= vocabulary:
        raise damaged(
            path,
            f"largest_token in its manifest.json is {largest}, but must be below the vocab_size of its tokenizer, "
            f"{vocabulary}",
        )
    return manifest


def damaged(path: str, what: str) -> InputError:
    """The error for a store in which something cannot be right."""
    return InputError(f"{path} is damaged: {what}; copy or prepare it again")


def _integer(least: int, most: int = 2**60) -> tuple[Callable[[Any], bool], str]:
    return lambda value: type(value) is int and least <= value <= most, f"an integer from {least} to {most}"


def _text(pattern: str, wanted: str) -> tuple[Callable[[Any], bool], str]:
    return lambda value: isinstance(value, str) and bool(re.fullmatch(pattern, value)), wanted


def _is_file(name: str, size: Any) -> bool:
    path = pathlib.PurePosixPath(name)
    return type(size) is int and 0 <= size < 2**60 and not path.is_absolute() and ".." not in path.parts


_TOKENS = (
    lambda value: isinstance(value, list) and all(type(token) is int and token >= 0 for token in value),
    "a list of token ids",
)
_OPTIONAL = ("bos", "eos", "largest_token")
"""Fields that not every writer states; a store of an older version has no largest token."""
_FIELDS = {
    "documents": _integer(1),
    "tokens": _integer(1),
    "tokenizer": (
        lambda value: isinstance(value, dict) and value.keys() == {"name", "vocab_size", "vocab_hash"},
        "an object with name, vocab_size and vocab_hash",
    ),
    "tokenizer.name": _text(".*", "a string"),
    "tokenizer.vocab_size": _integer(1, LARGEST_VOCABULARY),
    "tokenizer.vocab_hash": _text("[0-9a-f]{64}", "64 hexadecimal digits"),
    "largest_token": _integer(0),
    "bos": _TOKENS,
    "eos": _TOKENS,
    "sha256": _text("[0-9a-f]{64}", "64 hexadecimal digits"),
    "length_histogram": (lambda value: isinstance(value, dict), "an object"),
    "files": (
        lambda value: isinstance(value, dict) and all(_is_file(*item) for item in value.items()),
        "an object with the size of each file of the store in bytes",
    ),
}
"""Name -> whether a value fits, and what it must be."""
