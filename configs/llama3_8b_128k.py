"""Llama 3 8B from 8,192 to 131,072 tokens by Position Interpolation: a window of today on a model of today.

    python -m pi_jax.prepare --input TEXT --tokenizer models/llama-3-8b --output data/long --window 131072
    python -m pi_jax.plan --config configs/llama3_8b_128k.py --topology h100:32
    python -m pi_jax.train --config configs/llama3_8b_128k.py

No published table holds this run. A row is split over 8 devices (mesh.context). Hardware: 32 H100
(docs/performance.md).
"""

import dataclasses

from pi_jax.config import Config, MeshConfig
from pi_jax.config.recipes import llama


def get_config() -> Config:
    config = llama("llama-3-8b", window=131072)
    return dataclasses.replace(
        config,
        mesh=MeshConfig(context=8),
        data=dataclasses.replace(config.data, batch_size=32),
        compute=dataclasses.replace(config.compute, gradient_accumulation_steps=8),
    )
