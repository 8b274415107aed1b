"""Llama 2 7B from 4,096 to 32,768 tokens by Position Interpolation: today's equivalent of the paper's 7B run.

    python -m pi_jax.prepare --input TEXT --tokenizer models/llama-2-7b --output data/pile --window 32768
    python -m pi_jax.plan --config configs/llama2_7b_32k.py --topology h100:8
    python -m pi_jax.train --config configs/llama2_7b_32k.py

No table of the paper holds this run. For comparison: Together's Llama 2 7B 32k, interpolated by 8 too, has a proof-pile
perplexity of 3.50 at 8,192 and 2.64 at 32,768 tokens (Peng et al. 2023, Table 2). Hardware: 8 H100
(docs/performance.md).
"""

import dataclasses

from pi_jax.config import ComputeConfig, Config
from pi_jax.config.recipes import llama


def get_config() -> Config:
    # 16 rows a device, one at a time.
    return dataclasses.replace(llama("llama-2-7b", window=32768), compute=ComputeConfig(gradient_accumulation_steps=16))
