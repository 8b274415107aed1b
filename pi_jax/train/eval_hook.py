"""Evaluation inside a run: perplexity on held-out text and passkey retrieval, logged like any metric.

So a run shows what the paper's Tables 3 and 4 show: perplexity and k_max against training steps.
"""

from typing import Any

import jax

from pi_jax import log
from pi_jax.config import Config, ModelConfig
from pi_jax.data.tokenizer import load_tokenizer
from pi_jax.evaluate import passkey
from pi_jax.evaluate.loaded import BATCH_TOKENS
from pi_jax.evaluate.perplexity import command
from pi_jax.generate import Generator, warn_beyond_window
from pi_jax.model import Llama
from pi_jax.train.metrics import Metrics


class Evaluation:
    """The evaluations of a run. All inputs are read and checked at construction."""

    def __init__(self, config: Config, model: ModelConfig, files: str):
        """Reads text and tokenizer.

        Args:
          config: the experiment.
          model: the architecture that is trained.
          files: folder with its tokenizer.

        Raises:
          InputError: for text, windows or a tokenizer that cannot be used.
        """
        self._config = config.evaluate
        self._heldout = self._tokenizer = None
        if self._config.data:
            names, documents = command.read_tokens(self._config.data, files, model.vocab_size, self._config.max_tokens)
            windows = self._config.windows or (config.data.window,)
            command.check_windows(documents, windows, self._config.stride)
            self._heldout = names, documents, windows
        if self._config.passkey_lengths:
            self._tokenizer = load_tokenizer(files)
            lengths = self._config.passkey_lengths
            passkey.require_room(self._tokenizer, model.vocab_size, lengths, "evaluate.passkey_lengths")
            warn_beyond_window(model, max(self._config.passkey_lengths))

    def __call__(self, model: Llama, mesh: jax.sharding.Mesh, step: int, logger: Metrics) -> dict[str, Any]:
        """Evaluates the model after `step` updates, logs the metrics and returns the full results."""
        found: dict[str, Any] = {}
        values: dict[str, float] = {}
        if self._heldout:
            names, documents, windows = self._heldout
            results = command.evaluate_model(model, mesh, names, documents, windows, self._config.stride)
            log.info(f"Held-out perplexity after {step} steps ({len(names)} documents), by position in the document:")
            log.info(command.table(results))
            found["perplexity"] = results
            values |= {f"perplexity/{r['window']}": r["perplexity"] for r in results}
        if lengths := self._config.passkey_lengths:
            generator = Generator(model, mesh, max_length=max(lengths))
            distances, trials = self._config.passkey_distances, self._config.passkey_trials
            results = [
                passkey.measure_distances(generator, self._tokenizer, n, distances, trials, 0, BATCH_TOKENS)
                for n in lengths
            ]
            log.info(f"Passkey after {step} steps:\n{passkey.table({'results': results, 'grid': None})}")
            found["passkey"] = results
            for r in results:
                values[f"passkey/{r['length']}"] = r["k_max"]
                values[f"passkey_success/{r['length']}"] = r["success"]
        if values:
            logger.write(step, values)
        return found
