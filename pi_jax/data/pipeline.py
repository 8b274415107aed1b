"""Computes the batch of any step as a pure function of the config and the token stores.

Each source is shuffled separately, with a new order in every epoch, and repeated indefinitely. The sources are
interleaved by weight into one stream of sequences, and step t uses the sequences from t * batch_size to
(t + 1) * batch_size. The batch of a step is therefore the same on any number of hosts, and a run resumes from its step
alone: there is no iterator state to save. Grain provides the permutations, the interleaving and the threads that
prepare batches in advance.
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
from pi_jax.errors import InputError, some

Batch = dict[str, np.ndarray]
"""The arrays of `packing.PackedSequence`, of shape [batch_size, window]."""

# Fields of `DataConfig` that determine the batches. Add a new field here if it does too.
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
    """Relative number of sequences taken from this store, regardless of its size."""


def parse_source(text: str) -> Source:
    """Parses 'STORE' or 'STORE@WEIGHT'. The default weight is 1.

    Raises:
      InputError: if the text after the last '@' of the last path component is not a positive number.
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


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where the text of a sequence comes from."""

    store: str
    """Path of the token store."""
    first: int
    """First document, from 0, in the order of the store."""
    last: int
    """Last document; the same as the first if the sequence lies inside one."""
    start: int
    """Position of the first token in the first document."""
    tokens: int
    """Number of tokens, including the last target."""

    def __str__(self) -> str:
        documents = f"document {self.first}" if self.first == self.last else f"documents {self.first}-{self.last}"
        return f"{self.store} {documents} from token {self.start}"


class Sequences:
    """The sequences of one store in the order of its documents: `sequences[i]` is a `packing.PackedSequence`."""

    def __init__(self, store: TokenStore, config: DataConfig):
        self._store, self._config = store, config
        self._spans = packing.Spans(store.offsets, config.window, config.packing)

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> packing.PackedSequence:
        return packing.pack(
            self._store.read(*self._spans[index]),
            self._spans.boundaries(index),
            self._config.window,
            segment_masking=self._config.segment_masking,
            reset_positions=self._config.reset_positions,
            prompt=self._spans.in_prompt(index, self._store.prompts) if self._config.mask_prompts else None,
        )

    def origin(self, index: int) -> Origin:
        """Where the text of a sequence comes from."""
        start, stop = self._spans[index]
        first, last = (np.searchsorted(self._store.offsets, [start, stop - 1], side="right") - 1).tolist()
        return Origin(self._store.path, first, last, start - int(self._store.offsets[first]), stop - start)


class Pipeline:
    """The batches of a run; see the module docstring. `open_pipeline` opens the stores and checks them first.

    Args:
      config: data config, including the weights of the sources.
      stores: one store for each of `config.sources`, with at least one sequence each.
    """

    def __init__(self, config: DataConfig, stores: Sequence[TokenStore]):
        self.config, self.stores = config, tuple(stores)
        self._sources = sources = [Sequences(store, config) for store in stores]
        weights = [parse_source(source).weight for source in config.sources]
        # Grain shuffles epoch e with seed + e. Consecutive seeds would therefore repeat the orders of other sources,
        # and equal seeds would give stores of the same size the same order.
        seeds = np.random.SeedSequence(config.seed).generate_state(len(sources))
        self._stream = grain.MapDataset.mix(
            [
                grain.MapDataset.range(len(source)).shuffle(seed=int(seed)).repeat().map(lambda index, k=k: (k, index))
                for k, (source, seed) in enumerate(zip(sources, seeds, strict=True))
            ],
            weights,
        )
        self.num_sequences = sum(map(len, sources))

    @property
    def steps_per_epoch(self) -> float:
        """Number of steps that use as many sequences as all sources contain."""
        return self.num_sequences / self.config.batch_size

    @property
    def tokenizer_dir(self) -> str:
        """Local folder with the tokenizer files."""
        return self.stores[0].tokenizer_dir

    @property
    def largest_token(self) -> int:
        """Largest token id in the text."""
        return max(store.largest_token for store in self.stores)

    @property
    def vocab_hash(self) -> str:
        """See `store.TokenizerInfo`; the same for all stores."""
        return self.stores[0].tokenizer.vocab_hash

    @property
    def identity(self) -> dict[str, Any]:
        """The values that determine the batches, by field. Paths of stores and prefetching are not among them.

        A run can be resumed only with the same identity.
        """
        sources = [
            [store.manifest["sha256"], parse_source(source).weight]
            for store, source in zip(self.stores, self.config.sources, strict=True)
        ]
        return {"data.sources": sources} | {f"data.{name}": getattr(self.config, name) for name in _DECIDING_FIELDS}

    def batch(self, step: int, rows: slice | None = None) -> Batch:
        """Returns the batch of a step.

        Args:
          step: index of the step, from 0, without an upper limit.
          rows: sequences of the batch to read, such as those of one host; None reads all of them.

        Returns:
          The arrays of `packing.PackedSequence`, stacked along a new first axis.

        Raises:
          InputError: if a store cannot be read.
        """
        if step < 0:
            raise ValueError(f"step is {step}: it must be 0 or more")
        size = self.config.batch_size
        chosen = [self._sequence(i) for i in range(step * size, (step + 1) * size)[rows or slice(None)]]
        return {name: np.stack([sequence[name] for sequence in chosen]) for name in chosen[0]}

    def trace(self, step: int) -> list[Origin]:
        """Returns where each sequence of the batch of a step (from 0) comes from."""
        size = self.config.batch_size
        return [
            self._sources[k].origin(index)
            for k, index in (self._stream[i] for i in range(step * size, (step + 1) * size))
        ]

    def text_of(self, step: int) -> str:
        """The same in one line, for messages."""
        return some([f"{origin}" for origin in self.trace(step)])

    def _sequence(self, number: int) -> packing.PackedSequence:
        """Returns a sequence of the stream. With PoSE, the same text has another jump in each epoch."""
        source, index = self._stream[number]
        sequence = self._sources[source][index]
        if not self.config.pose_window:
            return sequence
        seed = (self.config.seed, number)
        return sequence | {"positions": packing.skip_positions(sequence["positions"], self.config.pose_window, seed)}

    def iterate(self, start_step: int, rows: slice | None = None) -> Iterator[Batch]:
        """Iterates over `batch(start_step, rows)`, `batch(start_step + 1, rows)` and so on, indefinitely.

        Threads prefetch `config.prefetch` batches. The `close` method of the iterator stops them.
        """
        threads = min(self.config.prefetch, _MAX_THREADS)
        return iter(
            grain.MapDataset.range(start_step, sys.maxsize)
            .map(lambda step: self.batch(step, rows))
            .to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=self.config.prefetch))
        )


def open_pipeline(config: DataConfig) -> Pipeline:
    """Opens the stores of a config, checks them and returns the pipeline.

    Raises:
      InputError: if there is no source, a store is missing, incomplete or damaged, the tokenizers differ,
        `config.require_long_documents` is set and no document of a store fills the window, `config.mask_prompts` is set
        and a store has no prompts, or a store is too small for one sequence.
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
            "prepare both with the tokenizer of the model"
        )
    if config.mask_prompts and store.prompts is None:
        raise InputError(
            f"data.mask_prompts is set, but no document of {store.path} has a prompt: prepare it with --prompt-field"
        )
    longest = int(np.diff(store.offsets).max())
    if config.require_long_documents and longest < config.window:
        raise InputError(
            f"data.window is {config.window}, but the longest document of {store.path} has {longest} tokens, so no "
            "long distances would be trained: use a shorter --data.window, or --data.no-require-long-documents"
        )
    if not len(Sequences(store, config)):
        raise InputError(
            f"{store.path} has {store.num_tokens} tokens: one sequence needs data.window + 1, {config.window + 1}"
        )
