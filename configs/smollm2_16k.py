r"""SmolLM2-135M from 8,192 to 16,384 tokens by Position Interpolation, on a CPU: a real model, real books.

    python benchmarks/real_inputs.py --output smollm2
    python -m pi_jax.prepare --input smollm2/text/train --tokenizer smollm2/model --output smollm2/tokens --window 16384
    python -m pi_jax.train --config configs/smollm2_16k.py

What to expect (docs/results.md has the tables): the interpolated model's perplexity starts at twice the original one's
and comes back within some tens of steps; beyond 8,192 tokens the untouched model is of no use. Rows of 2,048 tokens
are enough to see that, and are what two CPU cores can train in 20 to 30 minutes (4.2 GiB of memory); on a GPU use
`--data.window 16384 --data.batch-size 8 --compute.dtype bfloat16 --train.steps 1000 --optimizer.learning-rate 2e-5`.

The honest control, the same steps without interpolation:

    python -m pi_jax.train --config configs/smollm2_16k.py --rope.kind default --rope.factor 1 \
        --train.output runs/control
"""

from pi_jax.config import (
    CheckpointConfig,
    ComputeConfig,
    Config,
    DataConfig,
    LoggingConfig,
    OptimizerConfig,
    RopeConfig,
    TrainConfig,
)


def get_config() -> Config:
    return Config(
        rope=RopeConfig("linear", 2.0),
        compute=ComputeConfig(dtype="float32", loss_chunk=256),
        data=DataConfig(sources=("smollm2/tokens",), window=2048, batch_size=1),
        # Five times the paper's rate and a quarter of its warm-up: a hundred thousand tokens, not half a billion.
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=5),
        train=TrainConfig(init_from="smollm2/model", output="runs/smollm2-16k", steps=64),
        checkpoint=CheckpointConfig(every=32),
        logging=LoggingConfig(every=4),
    )
