"""Checks that the dataclasses of the schema share."""

import typing
from typing import Annotated, Any, Literal

from pi_jax.errors import InputError


def require(ok: bool, message: str) -> None:
    """Raises InputError(message) unless `ok`."""
    if not ok:
        raise InputError(message)


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return value in arguments
    if origin is Annotated:
        return _fits(value, arguments[0])
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(item, arguments[0]) for item in value)
    if arguments:  # a union
        return any(_fits(value, argument) for argument in arguments)
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, hint)


def require_types(section: str, config: Any) -> None:
    """Checks the type of every field. Config files are Python, so nothing else would reject `steps=2.5`."""
    hints = typing.get_type_hints(type(config), include_extras=True)
    for name, hint in hints.items():
        value = getattr(config, name)
        wanted = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
        require(_fits(value, hint), f"{section}.{name} is {value!r}: it must be of type {wanted}")


def require_positive(section: str, config: Any, *names: str) -> None:
    """Checks that the fields with these names are above 0."""
    for name in names:
        value = getattr(config, name)
        require(value > 0, f"{section}.{name} is {value}: it must be positive")
