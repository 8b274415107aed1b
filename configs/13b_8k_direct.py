"""LLaMA 13B fine-tuned at 8,192 tokens without interpolation, 10,000 steps: the paper's baseline.

    python -m pi_jax.prepare --input TEXT --tokenizer models/llama-13b --output data/pile --window 8192
    python -m pi_jax.plan --config configs/13b_8k_direct.py --topology a100-80gb:32
    python -m pi_jax.train --config configs/13b_8k_direct.py

Expected (Chen et al. 2023, Table 1, PG-19 perplexity by evaluation window; the base model has 6.59 at 2,048):
6.56 at 2,048, 6.57 at 4,096, 6.69 at 8,192.
Hardware: 32 A100-80GB, the paper's number (memory: docs/performance.md). `launch/` starts it on a cluster.
"""

from pi_jax.config import Config
from pi_jax.config.recipes import llama


def get_config() -> Config:
    return llama("13b", window=8192, interpolate=False)
