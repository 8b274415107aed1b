"""Packs a token stream into training sequences.

A sequence of `window` tokens is made from one span of at most window + 1 tokens: its inputs are all tokens but the
last, its targets all but the first. `Spans` divides the stream into spans; `pack` makes a sequence from a span.

'joined' cuts the concatenated documents every `window` tokens, so each token but the last few is an input exactly once.
'document' cuts each document separately and pads the last piece.
"""

import dataclasses
import functools
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int

PackedSequence = dict[str, np.ndarray]
"""Arrays of shape [window]: tokens, targets, positions, segment_ids (all int32) and loss_weights (float32)."""


@dataclasses.dataclass(frozen=True)
class Spans:
    """The span of the token stream from which each sequence is made.

    Attributes:
      offsets: int64 of shape [D + 1], the start of each of the D documents in the stream, and the end of the stream.
      window: sequence length in tokens.
      packing: 'joined' or 'document'.
    """

    offsets: Int[np.ndarray, " D+1"]
    window: int
    packing: Literal["joined", "document"]

    def __len__(self) -> int:
        """Number of sequences. An incomplete sequence of 'joined' and a piece of one token do not count."""
        if self.packing == "joined":
            return max(0, int(self.offsets[-1]) - 1) // self.window
        return int(self._first_sequences[-1])

    def __getitem__(self, index: int) -> tuple[int, int]:
        """Start and stop of the span of a sequence: window + 1 tokens, or 2 to window + 1 with 'document'."""
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} is out of range: there are {len(self)} sequences")
        if self.packing == "joined":
            return index * self.window, (index + 1) * self.window + 1
        document = int(np.searchsorted(self._first_sequences, index, side="right")) - 1
        start = int(self.offsets[document]) + (index - int(self._first_sequences[document])) * self.window
        return start, min(start + self.window + 1, int(self.offsets[document + 1]))

    def boundaries(self, index: int) -> Int[np.ndarray, " K"]:
        """Starts of documents inside the span of a sequence, relative to its first token, which is not included."""
        start, stop = self[index]
        first, last = np.searchsorted(self.offsets, [start + 1, stop])
        return self.offsets[first:last] - start

    def in_prompt(self, index: int, prompts: Int[np.ndarray, " D"]) -> Bool[np.ndarray, " n"]:
        """Whether each token in the span of a sequence belongs to a prompt, given the prompt length per document."""
        tokens = np.arange(*self[index])
        document = np.searchsorted(self.offsets, tokens, side="right") - 1
        return tokens - self.offsets[document] < prompts[document]

    @functools.cached_property
    def _first_sequences(self) -> np.ndarray:
        """int64 [D + 1]: with 'document', the first sequence of each document, and the number of sequences."""
        counts = -((1 - np.diff(self.offsets)) // self.window)  # ceil((length - 1) / window)
        return np.concatenate([[0], np.cumsum(counts)])


def pack(
    span: Int[np.ndarray, " n"],
    boundaries: Int[np.ndarray, " K"],
    window: int,
    *,
    segment_masking: bool,
    reset_positions: bool,
    prompt: Bool[np.ndarray, " n"] | None = None,
) -> PackedSequence:
    """Makes a sequence from a span. A short span is padded on the right with token 0, segment 0 and weight 0.

    Args:
      span: 2 to window + 1 tokens.
      boundaries: indices in `span` at which a new document starts, ascending, each at least 1.
      window: sequence length in tokens.
      segment_masking: number the documents in the sequence from 1 in `segment_ids`, and give weight 0 to the prediction
        of a document's first token, which does not depend on the document before it. Otherwise all tokens but the
        padding are in segment 1.
      reset_positions: count positions from 0 in each document. Otherwise they count through the complete sequence.
      prompt: whether each token of `span` belongs to a prompt; its prediction then has weight 0. None: no prompts.
    """
    real = len(span) - 1
    document = np.searchsorted(boundaries, np.arange(real + 1), side="right")  # index of each token's document

    positions = np.arange(window, dtype=np.int32)
    if reset_positions:
        starts = np.concatenate([[0], boundaries])
        positions[:real] -= starts[document[:-1]]

    weights = np.ones(real, np.float32)
    if segment_masking:
        weights[document[:-1] != document[1:]] = 0
    if prompt is not None:
        weights[prompt[1:]] = 0

    def padded(values: np.ndarray, dtype: type = np.int32) -> np.ndarray:
        sequence = np.zeros(window, dtype)
        sequence[:real] = values
        return sequence

    return {
        "tokens": padded(span[:-1]),
        "targets": padded(span[1:]),
        "positions": positions,
        "segment_ids": padded(document[:-1] + 1 if segment_masking else 1),
        "loss_weights": padded(weights, np.float32),
    }


def skip_positions(positions: Int[np.ndarray, " window"], reach: int, seed: tuple[int, ...]) -> np.ndarray:
    """Returns the positions of a sequence with one jump, to train a longer window with short sequences (PoSE).

    The sequence is split at a random point, and the positions of the second part are shifted by a random number of
    tokens. Both are uniformly distributed and differ for each sequence, so that over many sequences all positions and
    distances below `reach` occur (Zhu et al. 2023, arXiv 2309.10400, section 3.2, with two chunks of contiguous text).

    Args:
      positions: int32 of shape [window]: 0, 1, 2 and so on.
      reach: window to train for, in tokens; at least the length of the sequence.
      seed: seed of the two random numbers.
    """
    rng = np.random.default_rng(seed)
    window = len(positions)
    cut, shift = rng.integers(1, window), rng.integers(0, reach - window + 1)
    return np.where(np.arange(window) < cut, positions, positions + shift).astype(np.int32)
