"""The one exception for anything a user can put right."""


class InputError(ValueError):
    """Bad input: a file, a field or a flag. The message is one sentence that names the file or
    field, the value found and what would be right; commands print it and exit with status 2."""
