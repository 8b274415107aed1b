"""Looks at the loss and the gradient norm of every step: values that are not finite, spikes, a model that died."""

import collections
import math

import numpy as np

from pi_jax import log
from pi_jax.data.pipeline import Pipeline

_RECENT, _FEWEST = 64, 20
"""A spike is judged by the last 64 losses, of which there must be 20."""
_SPREADS = 8.0
"""A loss this many standard deviations above the recent ones is a spike."""
_DEAD = 20
"""Steps in a row without a gradient after which a model counts as dead."""


class Monitor:
    """Reports what goes wrong, with the text of the batch; ends the run if it goes on."""

    def __init__(self, pipeline: Pipeline, vocab_size: int, max_skipped_steps: int):
        """Starts without a history.

        Args:
          pipeline: the batches.
          vocab_size: V. An untrained model has a loss of ln V.
          max_skipped_steps: steps in a row whose loss or gradient is not finite that end the run.
        """
        self._pipeline, self._uniform, self._most = pipeline, math.log(vocab_size), max_skipped_steps
        self._recent: collections.deque[float] = collections.deque(maxlen=_RECENT)
        self._skipped = self._dead = 0

    def observe(self, step: int, loss: float, grad_norm: float) -> None:
        """Looks at a step.

        Raises:
          FloatingPointError: if this is the last of too many steps in a row that were not finite.
        """
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self._skip(step, loss, grad_norm)
            return
        self._skipped = 0
        self._dead = self._dead + 1 if grad_norm == 0 else 0
        if self._dead == _DEAD:
            log.warn(
                f"the gradient has been 0 for {_DEAD} steps, up to step {step}, at a loss of {loss:.4f} (uniform "
                f"guessing: {self._uniform:.4f}): the model does not learn; check the base model, the learning rate "
                "and the masks"
            )
        if len(self._recent) >= _FEWEST:
            middle = float(np.median(self._recent))
            spread = 1.4826 * float(np.median(np.abs(np.array(self._recent) - middle)))
            if loss > middle + max(_SPREADS * spread, 0.1 * middle):
                log.warn(f"step {step}: loss {loss:.4f} after a median of {middle:.4f}; {self._text(step)}")
        self._recent.append(loss)

    def _skip(self, step: int, loss: float, grad_norm: float) -> None:
        self._skipped += 1
        what = f"loss {loss:g}, gradient norm {grad_norm:g}"
        if self._skipped == self._most:
            raise FloatingPointError(
                f"{what} at step {step}: not finite for {self._most} steps in a row (train.max_skipped_steps), so the "
                f"run ended; the weights are those of step {step - self._most}; {self._text(step)}"
            )
        log.warn(f"step {step}: {what}: not finite, so the step was skipped; {self._text(step)}")

    def _text(self, step: int) -> str:
        """Says where the text of the batch of a step comes from, for a message."""
        return f"its text: {self._pipeline.text_of(step - 1)}"
