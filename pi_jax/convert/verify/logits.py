"""Checks that pi_jax and transformers compute the same logits, inside the original window and beyond it.

To keep memory low, both load only a part of the model: the first layers, the first vocabulary entries and, for large
models, the first feed-forward channels and heads. The part is itself a complete model, so a wrong name, row order, RoPE
scaling or norm shows up as it would in the complete model. pi_jax loads it with its own readers, transformers with its
own parser of config.json and the safetensors library.
"""

import dataclasses
import importlib.util
from typing import Any

import jax
import numpy as np

from pi_jax.config import ComputeConfig, MeshConfig, ModelConfig
from pi_jax.convert import param_mapping, pipeline, sharded_load
from pi_jax.convert.folders import is_remote, read_json
from pi_jax.convert.verify import readback
from pi_jax.errors import InputError
from pi_jax.parallel import placement, sharding

_PARAMETERS = 16_000_000  # size of the part; it has at least one layer
_VOCABULARY, _CHANNELS, _TOKENS = 512, 1024, 48
TOLERANCE = 1e-3
"""Largest allowed difference of logits, relative to the largest logit if that is above 1."""


def part_of(config: ModelConfig) -> ModelConfig:
    """Returns the architecture of the part to compare: fewer layers, vocabulary entries, channels and heads."""
    small = dataclasses.replace(
        config,
        vocab_size=min(config.vocab_size, _VOCABULARY),
        num_hidden_layers=1,
        bos_token_id=None,
        eos_token_id=None,
    )
    if small.num_parameters() > _PARAMETERS:
        small = dataclasses.replace(small, intermediate_size=min(config.intermediate_size, _CHANNELS))
    if small.num_parameters() > _PARAMETERS:
        group = config.num_attention_heads // config.num_key_value_heads
        groups = min(config.num_key_value_heads, max(1, _CHANNELS // (group * config.head_dim)))
        small = dataclasses.replace(small, num_attention_heads=group * groups, num_key_value_heads=groups)
    layer = dataclasses.replace(small, num_hidden_layers=2).num_parameters() - small.num_parameters()
    layers = 1 + max(0, _PARAMETERS - small.num_parameters()) // layer
    return dataclasses.replace(small, num_hidden_layers=min(config.num_hidden_layers, layers))


def spread_positions(config: ModelConfig) -> np.ndarray:
    """Returns positions inside the original window and beyond it, up to the end of the extended window."""
    inside, last = config.original_window, config.max_position_embeddings
    half = _TOKENS // 2
    places = np.concatenate([np.linspace(0, inside - 1, half), np.linspace(min(inside, last - 1), last - 1, half)])
    return np.unique(places.astype(np.int32))


def available() -> bool:
    """Whether torch, which transformers needs to compute logits, is installed."""
    return importlib.util.find_spec("torch") is not None


def compare(reader: pipeline.Reader, config: ModelConfig, folder: Any) -> str:
    """Compares the logits of a model with those that transformers computes from a Hugging Face folder.

    Args:
      reader: weights of the model.
      config: architecture of the model.
      folder: Hugging Face folder. A remote folder is not compared.

    Returns:
      A phrase that says what was compared.

    Raises:
      InputError: if the logits differ by more than the tolerance.
    """
    if is_remote(folder):
        return "logits not compared (remote folder)"
    if not available():
        return "logits not compared (torch is not installed)"
    small, positions = part_of(config), spread_positions(config)
    tokens = np.random.default_rng(0).integers(0, small.vocab_size, len(positions)).astype(np.int32)
    ours, theirs = _ours(reader, small, tokens, positions), _theirs(folder, small, tokens, positions)
    difference, scale = float(np.abs(ours - theirs).max()), max(1.0, float(np.abs(theirs).max()))
    if not difference <= TOLERANCE * scale:
        raise InputError(
            f"{folder}: the logits of transformers and pi_jax differ by {difference:.2g} at positions up to "
            f"{positions[-1]}, but at most {TOLERANCE * scale:.2g} is allowed"
        )
    beyond = f" and beyond it to {positions[-1]:,}" if positions[-1] >= config.original_window else ""
    return (
        f"logits of {small.num_hidden_layers} of {config.num_hidden_layers} layers within {difference:.1e} of "
        f"transformers', inside the window of {config.original_window:,}{beyond}"
    )


def _ours(reader: pipeline.Reader, small: ModelConfig, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
    mesh = sharding.make_mesh(MeshConfig(), jax.local_devices()[:1])
    compute = ComputeConfig(dtype="float32", remat="none", attention="reference")
    with jax.set_mesh(mesh), jax.default_matmul_precision("float32"):
        model = sharded_load.load(reader, small, compute, mesh)
        batch = placement.put_batch(mesh, {"tokens": tokens[None], "positions": positions[None]})
        run = jax.jit(lambda model, batch: model.logits(model(batch["tokens"], batch["positions"])))
        return np.asarray(run(model, batch))[0]


def _theirs(folder: Any, small: ModelConfig, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
    import torch
    import transformers

    sizes = "vocab_size num_hidden_layers intermediate_size num_attention_heads num_key_value_heads head_dim".split()
    stated = read_json(f"{folder}/config.json") | {name: getattr(small, name) for name in sizes}
    stated |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    kind = transformers.AutoConfig.for_model(stated.pop("model_type"), **stated)
    model = transformers.AutoModelForCausalLM.from_config(kind, dtype=torch.float32, attn_implementation="eager")
    read = readback.hf_part(folder)
    state = {t.name: torch.from_numpy(read(t).astype(np.float32)) for t in param_mapping.tensors(small)}
    found = model.load_state_dict(state, strict=False, assign=True)
    if set(found.missing_keys) - {"lm_head.weight"} or found.unexpected_keys:
        raise InputError(
            f"{folder}: transformers expects other tensors: missing {found.missing_keys}, unexpected "
            f"{found.unexpected_keys}"
        )
    model.tie_weights()
    with torch.no_grad():
        # Without a mask, transformers interprets gaps between positions as packed documents and masks between them.
        out = model.eval()(
            torch.from_numpy(tokens.astype(np.int64))[None],
            position_ids=torch.from_numpy(positions.astype(np.int64))[None],
            attention_mask=torch.ones(1, len(tokens), dtype=torch.long),
            use_cache=False,
        )
    return out.logits[0].float().numpy()
