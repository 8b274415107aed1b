"""Sliding windows over documents: the loss of every token, scored exactly once.

A window of W tokens starts at the beginning of a document and advances by S tokens; the last one ends with the document
and may be shorter. The first window scores all its tokens but the very first; each later one only the tokens that it
adds, so these have at least W - S tokens before them. It is the loop of Hugging Face's documentation, of YaRN's and of
PoSE's evaluator (docs/evaluation.md says how they differ in what they average).
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

from pi_jax import cli
from pi_jax.evaluate.loglikelihood import score_sequences, sequences_per_batch
from pi_jax.model import Llama

BATCH_TOKENS = 8192
"""Tokens that a device reads at a time: several short windows side by side, or one long one."""
_SECONDS_BETWEEN_SAVES = 30


@dataclasses.dataclass(frozen=True)
class Window:
    """Tokens [start, stop) of a document are read, of which [first, stop) are scored."""

    document: int
    start: int
    first: int
    stop: int


def sliding_windows(document: int, length: int, window: int, stride: int) -> Iterator[Window]:
    """The windows over a document of `length` tokens: each token but the first is scored once."""
    start, stop = 0, min(window, length)
    yield Window(document, 0, 1, stop)
    while stop < length:
        start, first, stop = start + stride, stop, min(start + stride + window, length)
        yield Window(document, start, first, stop)


def plan_windows(lengths: Sequence[int], window: int, stride: int, bos: int | None = None) -> list[Window]:
    """The windows over documents of these lengths, those that score most tokens first.

    With a BOS token in front, a window holds one token of text fewer, and even a document's first token is scored.
    """
    width = window - (bos is not None)
    plan = [w for i, n in enumerate(lengths) for w in sliding_windows(i, n, width, stride)]
    if bos is not None:
        plan = [dataclasses.replace(w, first=0) if w.start == 0 else w for w in plan]
    return sorted(plan, key=lambda w: w.start > 0)  # windows of a batch then have about the same columns to score


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
    """The loss in nats of every token of every document; NaN for what is not scored (the first token, without BOS).

    Args:
      model: with parameters on `mesh`.
      documents: token ids, one array each.
      window: tokens that the model sees at most, BOS included. One program is compiled for it.
      stride: tokens that a window advances.
      mesh: its data and fsdp axes take windows side by side.
      bos: token put before every window, or None.
      advance: called with the number of windows done since the last call.
      partial: where an interrupted evaluation is taken up.
    """
    shift = bos is not None
    plan = plan_windows([len(tokens) for tokens in documents], window, stride, bos)
    rows = sequences_per_batch(mesh, window, BATCH_TOKENS, len(plan))
    ends = np.cumsum([len(tokens) for tokens in documents])
    losses = np.full(ends[-1], np.nan, np.float32)
    begin, losses = partial.load(f"{window}/{stride}", losses) if partial else (0, losses)
    results = np.split(losses, ends[:-1])  # views
    advance(begin)
    for done in range(begin, len(plan), rows):
        batch = plan[done : done + rows]
        tokens = np.zeros((rows, window), np.int32)
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
            partial.save(f"{window}/{stride}", done + len(batch), losses, last=done + rows >= len(plan))
        advance(len(batch))
    return results


class Partial:
    """What is scored so far, in a file beside the result, so that an interrupted evaluation goes on.

    Args:
      path: the file; process 0 writes it, at most every half minute and when a window size is done.
      identity: of the model, text and protocol: losses of another evaluation are not taken up.
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
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # damaged: scored anew
            self.rejected = True

    @property
    def windows_done(self) -> int:
        """Windows scored so far, over all window sizes."""
        return sum(int(array) for name, array in self._arrays.items() if name.endswith("done"))

    def load(self, key: str, empty: np.ndarray) -> tuple[int, np.ndarray]:
        """Windows done and losses found under a key; 0 and `empty` if there are none."""
        if f"{key}/done" not in self._arrays:
            return 0, empty
        return int(self._arrays[f"{key}/done"]), self._arrays[f"{key}/losses"]

    def save(self, key: str, done: int, losses: np.ndarray, last: bool) -> None:
        """Remembers, and writes the file if it is time."""
        self._arrays |= {f"{key}/done": np.int64(done), f"{key}/losses": losses}
        if jax.process_index() or (not last and time.monotonic() - self._saved < _SECONDS_BETWEEN_SAVES):
            return
        with cli.new_file(self.path) as temporary, open(temporary, "wb") as file:
            np.savez(file, identity=np.array(self._identity), **self._arrays)
        self._saved = time.monotonic()


def identity(model: Llama, documents: Sequence[np.ndarray], *facts: object) -> str:
    """A digest of an evaluation's parameters, text and protocol, wherever the model's files lie."""
    sums = jax.jit(lambda model: [jnp.sum(jnp.abs(x), dtype=jnp.float32) for x in jax.tree.leaves(model)])(model)
    digest = hashlib.sha256(repr((model.config, model.compute, [x.item() for x in sums], facts)).encode())
    for tokens in documents:
        digest.update(len(tokens).to_bytes(8, "little") + np.ascontiguousarray(tokens, np.int32).tobytes())
    return digest.hexdigest()
