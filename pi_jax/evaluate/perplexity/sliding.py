"""Sliding windows over documents, which score each token exactly once.

A window of W tokens starts at the beginning of a document and advances by S tokens. The last window ends with the
document and may be shorter. The first window scores all its tokens except the very first; each later window scores only
the tokens that it adds, which have at least W - S tokens before them. Hugging Face's documentation and the evaluators
of YaRN and PoSE use the same windows (docs/evaluation.md describes how their averages differ). With S = W the windows
are disjoint, and the first token of each has nothing before it: it is scored only with a BOS token.
"""

import dataclasses
import hashlib
import pathlib
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from pi_jax import atomic
from pi_jax.evaluate.loglikelihood import score_sequences, sequences_per_batch
from pi_jax.model import Llama
from pi_jax.parallel import supervisor

BATCH_TOKENS = 8192
"""Maximum number of tokens per device and batch, unless a single window is longer."""
_SECONDS_BETWEEN_SAVES = 30


@dataclasses.dataclass(frozen=True)
class Window:
    """A window that contains tokens [start, stop) of a document and scores [first, stop)."""

    document: int
    start: int
    first: int
    stop: int


def sliding_windows(document: int, length: int, width: int, stride: int, bos: bool = False) -> Iterator[Window]:
    """Yields the windows over a document of `length` tokens. Each token is scored at most once.

    Args:
      document: index of the document.
      length: number of its tokens.
      width: number of tokens of text in a window, without BOS.
      stride: number of tokens by which a window advances, at most `width`.
      bos: whether BOS precedes each window; otherwise, nothing predicts its first token.
    """
    start, scored, stop = 0, 0, min(width, length)
    while True:
        first = max(scored, start + (not bos))
        if first < stop:  # false where the last token is alone in its window
            yield Window(document, start, first, stop)
        if stop == length:
            return
        start, scored, stop = start + stride, stop, min(start + stride + width, length)


def plan_windows(lengths: Sequence[int], window: int, stride: int, bos: int | None = None) -> list[Window]:
    """Returns the windows over documents of the given lengths, those that score the most tokens first.

    With a BOS token, a window contains one token of text fewer, and its first token can be scored too.
    """
    width = window - (bos is not None)
    plan = [w for i, n in enumerate(lengths) for w in sliding_windows(i, n, width, stride, bos is not None)]
    return sorted(plan, key=lambda w: w.start > 0)  # windows in a batch then score similar ranges


def score_documents(
    model: Llama,
    documents: Sequence[Int[np.ndarray, " n"]],
    window: int,
    stride: int,
    mesh: jax.sharding.Mesh,
    bos: int | None = None,
    advance: Callable[[int], object] = lambda windows: None,
    partial: "Partial | None" = None,
) -> list[Float[np.ndarray, " n"]]:
    """Computes the loss in nats of each token of each document; NaN for tokens that are not scored.

    Without BOS, the first token of a document is not scored, nor that of a window if windows are disjoint.

    Args:
      model: model with its parameters on `mesh`.
      documents: token ids of each document.
      window: window size in tokens, including BOS. One program is compiled per window size.
      stride: number of tokens by which a window advances.
      mesh: mesh; a batch of windows is sharded over its data and fsdp axes.
      bos: token to prepend to each window, or None.
      advance: called with the number of windows completed since the last call.
      partial: saved losses, from which an interrupted evaluation continues.
    """
    shift = bos is not None
    plan = plan_windows([len(tokens) for tokens in documents], window, stride, bos)
    size = sequences_per_batch(mesh, window, BATCH_TOKENS, len(plan))
    ends = np.cumsum([len(tokens) for tokens in documents])
    losses = np.full(ends[-1], np.nan, np.float32)
    begin, losses = partial.load(f"{window}/{stride}", losses) if partial else (0, losses)
    results = np.split(losses, ends[:-1])  # views
    advance(begin)
    for done in range(begin, len(plan), size):
        supervisor.tick()
        batch = plan[done : done + size]
        tokens = np.zeros((size, window), np.int32)
        if shift:
            tokens[:, 0] = bos
        for row, w in zip(tokens, batch, strict=False):
            row[shift : shift + w.stop - w.start] = documents[w.document][w.start : w.stop]
        start = min(w.first - w.start for w in batch) + shift
        stop = max(w.stop - w.start for w in batch) + shift
        scored, _ = score_sequences(model, tokens, start, stop, min(stride, model.compute.loss_chunk), mesh)
        for row, w in zip(scored, batch, strict=False):
            results[w.document][w.first : w.stop] = row[shift + w.first - w.start : shift + w.stop - w.start]
        if partial:
            partial.save(f"{window}/{stride}", done + len(batch), losses, last=done + size >= len(plan))
        advance(len(batch))
    return results


class Partial:
    """Saves the losses computed so far in a file, so that an interrupted evaluation can continue.

    Args:
      path: file to write. Process 0 writes it at most every 30 seconds, and when a window size is completed.
      identity: digest of model, text and protocol. A file with another identity is rejected.
    """

    def __init__(self, path: str | pathlib.Path, identity: str):
        self.path, self._identity = pathlib.Path(path), identity
        self._saved, self._arrays = time.monotonic(), {}
        self.rejected = False
        try:
            with np.load(self.path, allow_pickle=False) as file:
                if str(file["identity"]) == identity:
                    self._arrays = {name: file[name] for name in file.files if name != "identity"}
                else:
                    self.rejected = True
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # the file is damaged
            self.rejected = True

    @property
    def windows_done(self) -> int:
        """Number of windows scored so far, over all window sizes."""
        return sum(int(array) for name, array in self._arrays.items() if name.endswith("done"))

    def load(self, key: str, empty: np.ndarray) -> tuple[int, np.ndarray]:
        """Returns the number of windows done and the losses saved under a key, or 0 and `empty`."""
        if f"{key}/done" not in self._arrays:
            return 0, empty
        return int(self._arrays[f"{key}/done"]), self._arrays[f"{key}/losses"]

    def save(self, key: str, done: int, losses: np.ndarray, last: bool) -> None:
        """Records the losses under a key, and writes the file if it is due or this is the last batch."""
        self._arrays |= {f"{key}/done": np.int64(done), f"{key}/losses": losses}
        if jax.process_index() or (not last and time.monotonic() - self._saved < _SECONDS_BETWEEN_SAVES):
            return
        with atomic.new_file(self.path) as temporary, open(temporary, "wb") as file:
            np.savez(file, identity=np.array(self._identity), **self._arrays)
        self._saved = time.monotonic()


def identity(model: Llama, documents: Sequence[np.ndarray], *facts: object) -> str:
    """Returns a digest of the weights, text and protocol of an evaluation, independent of the model's path."""
    sums = jax.jit(lambda model: [jnp.sum(jnp.abs(x), dtype=jnp.float32) for x in jax.tree.leaves(model)])(model)
    digest = hashlib.sha256(repr((model.config, model.compute, [x.item() for x in sums], facts)).encode())
    for tokens in documents:
        digest.update(len(tokens).to_bytes(8, "little") + np.ascontiguousarray(tokens, np.int32).tobytes())
    return digest.hexdigest()
