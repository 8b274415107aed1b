"""A tiny LLaMA on built-in text, to see the machinery work: nothing to download, about a minute on two CPU cores.

    python -m pi_jax.train --config configs/tiny.py

A model of 0.1 M parameters starts from random weights with RoPE interpolated by 4 (64 -> 256 tokens). It shows every
part of a run, not the paper's effect: that needs a pre-trained model, see docs/results.md.
"""

from pi_jax.config import (
    BUILTIN,
    CheckpointConfig,
    ComputeConfig,
    Config,
    DataConfig,
    EvaluateConfig,
    LoggingConfig,
    OptimizerConfig,
    RopeConfig,
    TrainConfig,
)
from pi_jax.tiny import tiny_model_config


def get_config() -> Config:
    return Config(
        model=tiny_model_config(),
        rope=RopeConfig("linear", 4.0),
        compute=ComputeConfig(dtype="float32"),
        data=DataConfig(sources=(BUILTIN,), window=256, batch_size=8),
        optimizer=OptimizerConfig(learning_rate=3e-3, schedule="cosine"),
        train=TrainConfig(output="runs/tiny", steps=300),
        checkpoint=CheckpointConfig(every=100),
        evaluate=EvaluateConfig(data=(BUILTIN,), windows=(64, 256), stride=32, max_tokens=2048),
        logging=LoggingConfig(every=20),
    )
