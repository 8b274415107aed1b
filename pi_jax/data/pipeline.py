"""The batch of any step: a pure function of the config and the stores.

Each source is shuffled by itself, anew every epoch, and repeated without end; the sources are interleaved by
weight; step t takes rows t * batch_size to (t + 1) * batch_size of that sequence. So the batch of a step is
the same on any number of hosts, and the position of a run is its step: there is no iterator state to save.
Grain supplies the permutations, the interleaving and the threads that prepare batches ahead.
"""

import dataclasses
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from pi_jax.config import DataConfig
from pi_jax.data import packing
from pi_jax.data.store import TokenStore
from pi_jax.errors import InputError

Batch = dict[str, np.ndarray]
"""The arrays of `packing.Row`, of shape [batch_size, window]."""

# Fields of `DataConfig` that decide the batches. A new one belongs here if it does too.
_DECIDING_FIELDS = (
    "window",
    "batch_size",
    "packing",
    "segment_masking",
    "reset_positions",
    "mask_prompts",
    "pose_window",
    "seed",
)
_MAX_THREADS = 8


@dataclasses.dataclass(frozen=True)
class Source:
    """One token store of a mixture."""

    path: str
    weight: float
    """Rows drawn from it are proportional to it, whatever the store's size."""


def parse_source(text: str) -> Source:
    """'STORE' or 'STORE@WEIGHT'; the weight is 1 where there is none.

    Raises:
      InputError: if what follows the last '@' of the last path component is no positive number.
    """
    path, at, weight = text.rpartition("@")
    if not at or "/" in weight:
        return Source(text, 1.0)
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not path or not 0 < value < math.inf:
        raise InputError(f"data source {text!r} has the weight {weight!r}: write STORE@WEIGHT with a positive number")
    return Source(path, value)


class Rows:
    """The rows of one store in the order of its documents: a random-access source for Grain.

    `rows[i]` is a `packing.Row`, the same every time.
    """

    def __init__(self, store: TokenStore, config: DataConfig):
        self._store, self._config = store, config
        self._spans = packing.Spans(store.offsets, config.window, config.packing)

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, row: int) -> packing.Row:
        return packing.pack(
            self._store.read(*self._spans[row]),
            self._spans.boundaries(row),
            self._config.window,
            segment_masking=self._config.segment_masking,
            reset_positions=self._config.reset_positions,
            prompt=self._spans.in_prompt(row, self._store.prompts) if self._config.mask_prompts else None,
        )


class Pipeline:
    """The batches of a run; see the module's docstring. `open_pipeline` makes one with all checks.

    Args:
      config: its sources give the weights.
      stores: one for each of `config.sources`, with at least one row each.
    """

    def __init__(self, config: DataConfig, stores: Sequence[TokenStore]):
        self.config, self.stores = config, tuple(stores)
        sources = [Rows(store, config) for store in stores]
        weights = [parse_source(source).weight for source in config.sources]
        # Grain's epoch e is shuffled with seed + e: neighbouring seeds would repeat each other's epochs, and
        # equal ones would walk through stores of the same size in step.
        seeds = np.random.SeedSequence(config.seed).generate_state(len(sources))
        self._rows = grain.MapDataset.mix(
            [
                grain.MapDataset.source(source).shuffle(seed=int(seed)).repeat()
                for source, seed in zip(sources, seeds, strict=True)
            ],
            weights,
        )
        self.num_rows = sum(map(len, sources))

    @property
    def steps_per_epoch(self) -> float:
        """Steps in which as many rows are drawn as all sources hold: each once, if there is one source."""
        return self.num_rows / self.config.batch_size

    @property
    def tokenizer_dir(self) -> str:
        """Local folder with the tokenizer's files."""
        return self.stores[0].tokenizer_dir

    @property
    def vocab_size(self) -> int:
        """Largest token id + 1."""
        return self.stores[0].tokenizer.vocab_size

    @property
    def vocab_hash(self) -> str:
        """See `store.TokenizerInfo`; the same for all stores."""
        return self.stores[0].tokenizer.vocab_hash

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that decides the batches, by field; where the stores lie and how they are read does not.

        A run that resumes with another identity would not continue with its data.
        """
        sources = [
            [store.manifest["sha256"], parse_source(source).weight]
            for store, source in zip(self.stores, self.config.sources, strict=True)
        ]
        return {"data.sources": sources} | {f"data.{name}": getattr(self.config, name) for name in _DECIDING_FIELDS}

    def batch(self, step: int, rows: slice | None = None) -> Batch:
        """The batch of a step.

        Args:
          step: from 0, without end.
          rows: only these rows of the batch, as a host reads its own share.

        Returns:
          The arrays of `packing.Row`, each [batch_size, window], or as many rows as `rows` names.

        Raises:
          InputError: if a store cannot be read.
        """
        if step < 0:
            raise ValueError(f"step {step}")
        size = self.config.batch_size
        chosen = [self._row(i) for i in range(step * size, (step + 1) * size)[rows or slice(None)]]
        return {name: np.stack([row[name] for row in chosen]) for name in chosen[0]}

    def _row(self, number: int) -> packing.Row:
        """A row of the endless sequence, by its number: an epoch later the same text has another jump."""
        row = self._rows[number]
        if not self.config.pose_window:
            return row
        seed = (self.config.seed, number)
        return row | {"positions": packing.skip_positions(row["positions"], self.config.pose_window, seed)}

    def iterate(self, start_step: int, rows: slice | None = None) -> Iterator[Batch]:
        """`batch(start_step, rows)`, `batch(start_step + 1, rows)` and so on, without end.

        Threads hold `config.prefetch` batches ready. The iterator has `close()`, which ends them.
        """
        threads = min(self.config.prefetch, _MAX_THREADS)
        return iter(
            grain.MapDataset.range(start_step, sys.maxsize)
            .map(lambda step: self.batch(step, rows))
            .to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=self.config.prefetch))
        )


def open_pipeline(config: DataConfig) -> Pipeline:
    """The pipeline of a config, with its stores opened and everything checked that can be.

    Raises:
      InputError: if there is no source, a store is missing, half-written or damaged, the tokenizers differ,
        no document of a store fills the window while `config.require_long_documents`, a store without prompts
        meets `config.mask_prompts`, or a store has no whole row.
    """
    if not config.sources:
        raise InputError("data.sources is empty: it must name at least one token store made by pi_jax.prepare")
    if config.seed < 0:
        raise InputError(f"data.seed is {config.seed}: it must be 0 or more")
    stores = [TokenStore.open(parse_source(source).path) for source in config.sources]
    for store in stores:
        _check(store, stores[0], config)
    return Pipeline(config, stores)


def _check(store: TokenStore, first: TokenStore, config: DataConfig) -> None:
    if store.tokenizer.vocab_hash != first.tokenizer.vocab_hash:
        raise InputError(
            f"the token stores {first.path} and {store.path} were made with different tokenizers: "
            "prepare both with that of the model"
        )
    if config.mask_prompts and store.prompts is None:
        raise InputError(
            f"data.mask_prompts is set, but no document of {store.path} has a prompt: prepare it with --prompt-field"
        )
    longest = int(np.diff(store.offsets).max())
    if config.require_long_documents and longest < config.window:
        raise InputError(
            f"data.window is {config.window} but the longest document of {store.path} has {longest} tokens, "
            "so nothing would train the long distances: choose a shorter --data.window, or "
            "--data.no-require-long-documents"
        )
    if not len(Rows(store, config)):
        raise InputError(
            f"{store.path} has {store.num_tokens} tokens: a row takes data.window + 1 = {config.window + 1}"
        )
