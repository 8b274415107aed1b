"""Checks that pi_jax and transformers compute the same logits, inside the original window and beyond it.

transformers reads the folders by itself, source and target: `from_pretrained` with the files as they are. Nothing of
pi_jax's reader decides which tensors it gets, so an assumption that both of our readers share still shows.

Of a large model, both load only a part, to keep memory low: the first layers, the first vocabulary entries and, where
that is still too much, the first feed-forward channels and heads. The part is itself a complete model, so a wrong name,
row order, RoPE scaling or norm shows as it would in the whole.
"""

import contextlib
import dataclasses
import importlib.util
import re
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from pi_jax.atomic import is_remote
from pi_jax.config import ComputeConfig, MeshConfig, ModelConfig
from pi_jax.convert import pipeline, sharded_load
from pi_jax.convert.folders import read_json
from pi_jax.convert.verify import readback
from pi_jax.errors import InputError, some
from pi_jax.parallel import placement, sharding

_WHOLE = 400_000_000  # parameters up to which the whole model is compared, in float32
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


def compare(config: ModelConfig, pairs: Sequence[tuple[pipeline.Reader, Any]]) -> str:
    """Compares the logits of a model with those that transformers computes from Hugging Face folders.

    Args:
      config: architecture of the model.
      pairs: readers of its weights, each with the Hugging Face folder that must be the same model. Remote folders are
        not compared.

    Returns:
      A phrase that says what was compared.

    Raises:
      InputError: if transformers cannot load a folder, or the logits differ by more than the tolerance.
    """
    local = [(reader, folder) for reader, folder in pairs if not is_remote(folder)]
    if not local:
        return "logits not compared (remote folder)"
    if not available():
        return "logits not compared (torch is not installed)"
    whole = config.num_parameters() <= _WHOLE
    small, positions = config if whole else part_of(config), spread_positions(config)
    tokens = np.random.default_rng(0).integers(0, small.vocab_size, len(positions)).astype(np.int32)
    largest = 0.0
    for reader, folder in local:
        ours = _ours(reader, small, tokens, positions)
        model = _load(folder) if whole else _load_part(folder, small)
        theirs = _theirs(model, tokens, positions)
        del model
        difference, scale = float(np.abs(ours - theirs).max()), max(1.0, float(np.abs(theirs).max()))
        if not difference <= TOLERANCE * scale:
            raise InputError(
                f"{folder}: the logits of transformers and pi_jax differ by {difference:.2g} at positions up to "
                f"{positions[-1]}, but at most {TOLERANCE * scale:.2g} is allowed"
            )
        largest = max(largest, difference)
    beyond = f" and beyond it to {positions[-1]:,}" if positions[-1] >= config.original_window else ""
    what = "all layers" if whole else f"{small.num_hidden_layers} of {config.num_hidden_layers} layers"
    both = " of source and target" if len({str(folder) for _, folder in local}) > 1 else ""
    return (
        f"logits of {what} within {largest:.1e} of transformers'{both}, inside the window of "
        f"{config.original_window:,}{beyond}"
    )


def _ours(reader: pipeline.Reader, small: ModelConfig, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
    mesh = sharding.make_mesh(MeshConfig(), jax.local_devices()[:1])
    compute = ComputeConfig(dtype="float32", remat="none", attention="reference")
    with jax.set_mesh(mesh), jax.default_matmul_precision("float32"):
        model = sharded_load.load(reader, small, compute, mesh)
        batch = placement.put_batch(mesh, {"tokens": tokens[None], "positions": positions[None]})
        run = jax.jit(lambda model, batch: model.logits(model(batch["tokens"], batch["positions"])))
        return np.asarray(run(model, batch))[0]


def _load(folder: Any) -> Any:
    """The model as transformers loads it."""
    import torch
    import transformers

    with _quiet():
        try:
            model, found = transformers.AutoModelForCausalLM.from_pretrained(
                str(folder),
                dtype=torch.float32,
                attn_implementation="eager",
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
        except Exception as error:  # invalid files raise many types of exception
            raise InputError(f"transformers cannot load {folder}: {textwrap.shorten(str(error), 300)}") from None
    _require_complete(folder, found["missing_keys"], found["unexpected_keys"])
    return model


def _load_part(folder: Any, small: ModelConfig) -> Any:
    """The first layers, rows and columns. Which tensors there are is decided by the files alone."""
    import torch
    import transformers

    names = readback.names(folder)
    sizes = "vocab_size num_hidden_layers intermediate_size num_attention_heads num_key_value_heads head_dim".split()
    stated = read_json(f"{folder}/config.json") | {name: getattr(small, name) for name in sizes}
    stated |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    stated["tie_word_embeddings"] = "lm_head.weight" not in names
    kind = transformers.AutoConfig.for_model(stated.pop("model_type"), **stated)
    with _quiet():
        model = transformers.AutoModelForCausalLM.from_config(kind, dtype=torch.float32, attn_implementation="eager")
    wanted, state = model.state_dict(), {}
    for name in names:
        layer = re.search(r"\.layers\.(\d+)\.", name)
        if (layer and int(layer[1]) >= small.num_hidden_layers) or name.endswith("rotary_emb.inv_freq"):
            continue
        shape = wanted[name].shape if name in wanted else None
        state[name] = torch.from_numpy(readback.part(folder, name, shape).astype(np.float32))
    found = model.load_state_dict(state, strict=False, assign=True)
    _require_complete(folder, set(found.missing_keys), set(found.unexpected_keys))
    model.tie_weights()
    return model


def _require_complete(folder: Any, missing: set[str], unexpected: set[str]) -> None:
    missing = set(missing) - {"lm_head.weight"}
    unexpected = {name for name in unexpected if not name.endswith("rotary_emb.inv_freq")}
    if missing or unexpected:
        raise InputError(
            f"{folder}: transformers expects other tensors: "
            + (f"{some(sorted(missing))} is missing" if missing else f"{some(sorted(unexpected))} is unknown to it")
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides transformers' progress bars and warnings."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _theirs(model: Any, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        # Without a mask, transformers interprets gaps between positions as packed documents and masks between them.
        out = model.eval()(
            torch.from_numpy(tokens.astype(np.int64))[None],
            position_ids=torch.from_numpy(positions.astype(np.int64))[None],
            attention_mask=torch.ones(1, len(tokens), dtype=torch.long),
            use_cache=False,
        )
    return out.logits[0].float().numpy()
