"""From a token stream to rows: which tokens a row holds, and what training is told about them.

A row of `window` tokens comes from one span of at most window + 1 tokens: the inputs are all but its last
token, the targets all but its first. Two ways to cut the spans (`Spans`), one way to make a row of a span
(`pack`).

'joined' cuts the stream of all documents every `window` tokens, so every token but the last few is an input
exactly once. 'document' cuts every document by itself and pads its last piece.
"""

import dataclasses
import functools
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int

Row = dict[str, np.ndarray]
"""Arrays [window]: tokens, targets, positions, segment_ids (all int32) and loss_weights (float32)."""


@dataclasses.dataclass(frozen=True)
class Spans:
    """The span of the token stream that each row is made of.

    Attributes:
      offsets: int64 of shape [D + 1], where the D documents start in the stream, and its end.
      window: tokens in a row.
      packing: 'joined' or 'document'.
    """

    offsets: Int[np.ndarray, " D+1"]
    window: int
    packing: Literal["joined", "document"]

    def __len__(self) -> int:
        """Rows. An incomplete row of 'joined' and a piece of one token, which has no target, do not count."""
        if self.packing == "joined":
            return max(0, int(self.offsets[-1]) - 1) // self.window
        return int(self._first_rows[-1])

    def __getitem__(self, row: int) -> tuple[int, int]:
        """Start and stop of a row's span: window + 1 tokens, or from 2 to window + 1 with 'document'."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        if self.packing == "joined":
            return row * self.window, (row + 1) * self.window + 1
        document = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        start = int(self.offsets[document]) + (row - int(self._first_rows[document])) * self.window
        return start, min(start + self.window + 1, int(self.offsets[document + 1]))

    def boundaries(self, row: int) -> Int[np.ndarray, " K"]:
        """Where documents start inside a row's span, its first token excepted, counted from that token."""
        start, stop = self[row]
        first, last = np.searchsorted(self.offsets, [start + 1, stop])
        return self.offsets[first:last] - start

    def in_prompt(self, row: int, prompts: Int[np.ndarray, " D"]) -> Bool[np.ndarray, " n"]:
        """Which tokens of a row's span belong to the prompt of their document, given the prompts' lengths."""
        tokens = np.arange(*self[row])
        document = np.searchsorted(self.offsets, tokens, side="right") - 1
        return tokens - self.offsets[document] < prompts[document]

    @functools.cached_property
    def _first_rows(self) -> np.ndarray:
        """int64 [D + 1]: with 'document', the first row of each document, and the number of rows."""
        rows = -((1 - np.diff(self.offsets)) // self.window)  # ceil((length - 1) / window)
        return np.concatenate([[0], np.cumsum(rows)])


def pack(
    span: Int[np.ndarray, " n"],
    boundaries: Int[np.ndarray, " K"],
    window: int,
    *,
    segment_masking: bool,
    reset_positions: bool,
    prompt: Bool[np.ndarray, " n"] | None = None,
) -> Row:
    """One row, padded on the right with token 0, segment 0 and weight 0 where its span is short.

    Args:
      span: 2 to window + 1 tokens.
      boundaries: where in `span` a new document starts, ascending, each at least 1.
      window: tokens in the row.
      segment_masking: number the documents of the row from 1 in `segment_ids`, and give weight 0 to the
        prediction of a document's first token, which the document before cannot tell. Otherwise all real
        tokens are segment 1.
      reset_positions: count positions from 0 in each document of the row. Otherwise through the whole row.
      prompt: which tokens of `span` belong to a prompt: their prediction has weight 0. None: none does.
    """
    real = len(span) - 1
    document = np.searchsorted(boundaries, np.arange(real + 1), side="right")  # of each token, from 0

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
        row = np.zeros(window, dtype)
        row[:real] = values
        return row

    return {
        "tokens": padded(span[:-1]),
        "targets": padded(span[1:]),
        "positions": positions,
        "segment_ids": padded(document[:-1] + 1 if segment_masking else 1),
        "loss_weights": padded(weights, np.float32),
    }


def skip_positions(positions: Int[np.ndarray, " window"], reach: int, seed: tuple[int, ...]) -> np.ndarray:
    """Positions of a row with one jump, so that they stay below `reach` and their distances cover it (PoSE).

    The row is cut in two at a random place, and the second part's positions are shifted by a random number of tokens,
    both uniform and anew for every row: positions and distances up to `reach` are trained, at the cost of a short row
    (Zhu et al. 2023, arXiv 2309.10400, section 3.2, with two chunks of continuous text).

    Args:
      positions: 0, 1, 2 and so on, int32.
      reach: the window trained for, at least the row's.
      seed: what the two random numbers depend on.
    """
    rng = np.random.default_rng(seed)
    window = len(positions)
    cut, shift = rng.integers(1, window), rng.integers(0, reach - window + 1)
    return np.where(np.arange(window) < cut, positions, positions + shift).astype(np.int32)
