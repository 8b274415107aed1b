"""Prints generated text on the console token by token."""

from typing import Any


class Stream:
    """Prints a text while its tokens are generated. A character of several tokens is printed once it is complete."""

    def __init__(self, tokenizer: Any):
        self._tokenizer, self._tokens, self._shown = tokenizer, [], ""

    def __call__(self, _: int, token: int) -> None:
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._show(text)

    def close(self) -> None:
        """Prints the remaining text and ends the line."""
        self._show(self._tokenizer.decode(self._tokens))
        print()

    def _show(self, text: str) -> None:
        print(text[len(self._shown) :], end="", flush=True)
        self._shown = text
