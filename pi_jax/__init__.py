"""Extends the context window of LLaMA-family models by Position Interpolation, in JAX.

In six lines (docs/api.md has the rest):

    from pi_jax.config import RopeConfig
    from pi_jax.evaluate.loaded import LoadedModel

    model = LoadedModel.open("models/llama-7b", rope=RopeConfig("linear", 16.0))
    print(model.generate("Once upon a time"), model.loglikelihood("Once upon a time").mean())

`pi_jax.data.prepare.prepare` tokenizes, `pi_jax.train.loop.train` fine-tunes a `pi_jax.config.Config`,
`pi_jax.evaluate` has the evaluations, `pi_jax.convert` reads and writes weights. Each is also a command:
`python -m pi_jax.NAME --help`.
"""

import sys

__version__ = "0.1.0"

if sys.argv[:1] == ["-m"]:  # `python -m pi_jax...` is looking for its module, whose imports come next
    from pi_jax import dependencies

    dependencies.require()
