"""The one exception for anything a user can put right, and how its message lists names."""

from collections.abc import Sequence


class InputError(ValueError):
    """Bad input: a file, a field or a flag. The message is one sentence that names the file or
    field, the value found and what would be right; commands print it and exit with status 2."""


def some(names: Sequence[str]) -> str:
    """The first three of several names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
