"""The stages of `extend`: each is one of the other commands, with the file that shows that it is done."""

import dataclasses
import pathlib
import shlex

from pi_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Stage:
    """A command of pi_jax, and what it leaves behind."""

    title: str
    argv: tuple[str, ...]
    """The command line after `python -m pi_jax`."""
    product: pathlib.Path
    """File that exists if, and only if, the stage is complete."""

    @property
    def shown(self) -> str:
        """The command as one would type it."""
        return shlex.join(("python", "-m", "pi_jax", *self.argv))


@dataclasses.dataclass(frozen=True)
class Variant:
    """A model to evaluate: the base model in some scaling, or the weights after some steps of fine-tuning."""

    label: str
    """Name in tables."""
    name: str
    """Stem of its result files."""
    path: str
    windows: tuple[int, ...]
    """Windows in tokens for perplexity."""
    rope: tuple[str, ...] = ()
    """Options that scale the model."""
    step: int | None = None
    """Step of fine-tuning; None for the base model."""


def tokens(text: str) -> int:
    """Reads a number of tokens: '32768' or '32k'.

    Raises:
      InputError: for anything else.
    """
    number, unit = (text[:-1], 1024) if text[-1:] in ("k", "K") else (text, 1)
    if not number.isdecimal() or len(number) > 9 or not int(number):
        raise InputError(f"--window is {text!r}: it must be a number of tokens, such as 32768 or 32k")
    return int(number) * unit
