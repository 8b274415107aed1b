"""Bounds on what a file from elsewhere may ask for. They are checked before memory or time is spent on it.

`PI_JAX_LIMITS=N` in the environment multiplies all of them by N.
"""

import math
import os

from pi_jax.errors import InputError

VARIABLE = "PI_JAX_LIMITS"
"""Environment variable with the factor by which all bounds are multiplied; 1 if it is not set."""

JSON = 16 * 2**20
"""Bytes of a JSON file of a model or a token store, of the header of a safetensors file and of the pickle in a .pth
file: enough for 100,000 tensors."""
TOKENIZER = 64 * 2**20
"""Bytes of a file of a tokenizer, chat template included."""
PICKLE = 2_000_000
"""Operations in the pickle of a .pth file, about 40 for each tensor."""
DOCUMENT = 32 * 2**20
"""Bytes of a document in UTF-8, or of a line of JSON. Tokenizing takes 120 times as much memory with the tokenizer of a
LLaMA, and 300 times with one token per byte."""
JSON_LIST = 512 * 2**20
"""Bytes, uncompressed, of a .json file that is not JSON lines, so that it is loaded completely."""
DOCUMENTS = 10**9
"""Documents in a token store: their offsets are kept in memory, 8 bytes each."""
CHUNK = 2**24
"""Values in one chunk of a token store, which is decompressed at once."""
LAYERS = 10_000
"""Layers of a model: tensors are listed layer by layer."""
CHAT_SECONDS = 10
"""Seconds of processor time for a chat template, which can contain loops."""
CHAT_MEMORY = 2 * 2**30
"""Bytes of memory for a chat template."""


def raised(limit: int) -> int:
    """Returns a bound multiplied by the factor in the environment.

    Raises:
      InputError: if the factor is not a positive number.
    """
    text = os.environ.get(VARIABLE) or "1"
    try:
        factor = float(text)
    except ValueError:
        factor = math.nan
    if not 0 < factor < math.inf:
        raise InputError(f"{VARIABLE} is {text!r}: it must be a positive number, by which all limits are multiplied")
    return int(limit * factor)


def require(what: str, found: int, limit: int, unit: str = "bytes") -> None:
    """Checks that something is not larger than a bound.

    Args:
      what: the beginning of the message: "config.json has".
      found: its size.
      limit: one of the bounds of this module.
      unit: what is counted.

    Raises:
      InputError: if it is larger; the message says how to raise the bound.
    """
    if found > raised(limit):
        amount = f"{found:,} {unit}, more than the {raised(limit):,} allowed"
        raise InputError(f"{what} {amount}: {_advice(-(-found // limit))}")


def exceeded(what: str, limit: int, unit: str = "bytes") -> InputError:
    """The error for something of which only is known that it is larger than a bound; arguments as for `require`."""
    return InputError(f"{what} more than {raised(limit):,} {unit}: {_advice(-(-2 * raised(limit) // limit))}")


def _advice(factor: int) -> str:
    return f"if that is meant, set {VARIABLE}={factor} in the environment, which multiplies all such limits"
