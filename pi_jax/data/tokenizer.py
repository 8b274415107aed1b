"""Tokenizers: loading, encoding with special tokens, prompts, and what a store records of one."""

import dataclasses
import hashlib
import json
import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pi_jax.errors import InputError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files of a tokenizer in a model folder; those that exist are copied with it."""


def load_tokenizer(folder: str) -> Any:
    """The fast tokenizer of a local Hugging Face folder; nothing is downloaded, none of its code is run.

    Raises:
      InputError: if the folder is missing, or holds no tokenizer that transformers can load as a fast one.
    """
    import transformers

    if not os.path.isdir(folder):
        raise InputError(f"tokenizer {folder}: there is no such folder; download the model's tokenizer into one")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever the files made transformers or tokenizers raise
        reason = textwrap.shorten(str(error) or type(error).__name__, 300)
        raise InputError(f"tokenizer {folder} cannot be loaded: {reason}") from None
    if not tokenizer.is_fast:
        raise InputError(f"tokenizer {folder} is a {type(tokenizer).__name__}: a tokenizer.json is needed")
    return tokenizer


def encode(tokenizer: Any, texts: Sequence[str], *, bos: bool, eos: bool) -> list[np.ndarray]:
    """Token ids of each text, uint32 [n]; an empty text has none, neither BOS nor EOS.

    Raises:
      InputError: if BOS or EOS is asked for and the tokenizer has none.
    """
    before, after = special_tokens(tokenizer, "bos", bos), special_tokens(tokenizer, "eos", eos)
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # a tokenizer.json can ask for either
    backend.no_padding()
    encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
    ids = (encoding.ids for encoding in encodings)
    return [np.array([*before, *own, *after] if own else [], np.uint32) for own in ids]


def special_tokens(tokenizer: Any, name: str, wanted: bool) -> list[int]:
    token = getattr(tokenizer, f"{name}_token_id") if wanted else None
    if wanted and token is None:
        raise InputError(f"tokenizer {tokenizer.name_or_path} has no {name.upper()} token: use --no-{name}")
    return [token] if wanted else []


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What stands before a document's text and is given to the model, not predicted: a template with a text in it.

    Training and evaluation both cut and tokenize prompts here. The words before the prompt's own text, that text and
    the words after it are tokenized one by one, so that all three are the same wherever the text is cut.
    """

    template: str = "{}"
    """Words with one {} for the text."""
    max_tokens: int | None = None
    """Tokens of the text that are kept, the first ones; None: all."""

    def __post_init__(self):
        if self.template.count("{}") != 1:
            raise InputError(f"the prompt template is {self.template!r}: it must hold {{}} once, where the text goes")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise InputError(f"{self.max_tokens} tokens are to be kept of a prompt: the number must be positive")

    def encode(self, tokenizer: Any, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each prompt, uint32 [n], without special tokens."""
        before, after = encode(tokenizer, self.template.split("{}"), bos=False, eos=False)
        inside = encode(tokenizer, texts, bos=False, eos=False)
        return [np.concatenate([before, text[: self.max_tokens], after]) for text in inside]


@dataclasses.dataclass(frozen=True)
class TokenizerInfo:
    """What identifies a tokenizer: stores may only be mixed, or trained on, where `vocab_hash` agrees."""

    name: str
    vocab_size: int
    """Largest token id + 1: rows that an embedding table must have."""
    vocab_hash: str
    """SHA-256 of the sorted pairs of token and id."""

    @classmethod
    def of(cls, name: str, vocab: Mapping[str, int]) -> "TokenizerInfo":
        """The identity of a tokenizer with this `get_vocab()`."""
        canonical = json.dumps(sorted(vocab.items()), separators=(",", ":"))
        return cls(name, max(vocab.values()) + 1, hashlib.sha256(canonical.encode()).hexdigest())
