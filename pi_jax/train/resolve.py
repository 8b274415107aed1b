"""Opens and checks everything that a config names, so that a run fails before it has spent any time."""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import optax
from etils import epath

from pi_jax import tiny
from pi_jax.config import BUILTIN, Config, ModelConfig, extend
from pi_jax.convert.formats import meta
from pi_jax.convert.open import Source, open_model
from pi_jax.data.pipeline import Pipeline, open_pipeline
from pi_jax.data.tokenizer import TOKENIZER_FILES, TokenizerInfo, load_tokenizer
from pi_jax.errors import InputError
from pi_jax.parallel import sharding
from pi_jax.train.abstract import abstract_batch, abstract_model, check_sizes
from pi_jax.train.eval_hook import Evaluation
from pi_jax.train.optimizer import make_optimizer
from pi_jax.train.step import batch_loss

# Fields of `ModelConfig` that must not change when a run resumes. Add new ones that change what the model computes; the
# window does so only through RoPE, which is compared as a whole.
_MODEL_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "tie_word_embeddings",
)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A config with everything it names opened and checked."""

    config: Config
    """The config, with paths in place of `builtin:tiny`."""
    model: ModelConfig
    """The architecture, extended by `rope`."""
    source: Source | None
    """The base model; None: the run starts from random weights."""
    tokenizer: str
    """Folder with the tokenizer's files."""
    pipeline: Pipeline
    mesh: jax.sharding.Mesh
    optimizer: optax.GradientTransformation
    evaluation: Evaluation

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """Fields that must not change when a run resumes, and their values."""
        model = {f"model.{name}": getattr(self.model, name) for name in _MODEL_FIELDS}
        stored = {
            "compute.param_dtype": self.config.compute.param_dtype,
            "optimizer.moment_dtype": self.config.optimizer.moment_dtype,
        }
        base = {"train.init_from": self.source.digest() if self.source else ""}
        return self.pipeline.identity | model | {"rope": f"{self.model.rope}"} | stored | base


def resolve(config: Config) -> Experiment:
    """Opens and checks everything that a config names; writes nothing.

    Raises:
      InputError: for anything the user can fix.
    """
    config = with_builtin(config)
    model, source = resolve_model(config)
    pipeline = open_pipeline(config.data)
    own = source.tokenizer if source else ""
    mesh = sharding.make_mesh(config.mesh)
    _check_data(config, model, pipeline, own)
    check_sizes(config, model, mesh)
    # Trace the loss, without computing it, so that an attention backend rejects its arguments now.
    with jax.set_mesh(mesh):
        jax.eval_shape(batch_loss, abstract_model(model, config.compute, mesh), abstract_batch(config.data, mesh))
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    tokenizer = own or pipeline.tokenizer_dir
    evaluation = Evaluation(config, model, tokenizer)
    return Experiment(config, model, source, tokenizer, pipeline, mesh, optimizer, evaluation)


def with_builtin(config: Config) -> Config:
    """Replaces `builtin:tiny` by the paths of the built-in inputs, which are made on first use."""
    if BUILTIN not in (*config.data.sources, *config.evaluate.data, config.train.init_from):
        return config
    paths = tiny.tiny_inputs()
    sources = tuple(paths["tokens"] if s == BUILTIN else s for s in config.data.sources)
    heldout = tuple(paths["heldout"] if s == BUILTIN else s for s in config.evaluate.data)
    base = paths["model"] if config.train.init_from == BUILTIN else config.train.init_from
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, sources=sources),
        evaluate=dataclasses.replace(config.evaluate, data=heldout),
        train=dataclasses.replace(config.train, init_from=base),
    )


def resolve_model(config: Config) -> tuple[ModelConfig, Source | None]:
    """Returns the architecture to train, extended by `rope`, and the base model that it starts from, if any.

    Raises:
      InputError: if the folder cannot be read, disagrees with `model`, or neither is given.
    """
    model, source = config.model, None
    if config.train.init_from:
        # Meta's folders do not record the window, so take it from the config.
        window = model.max_position_embeddings if model and meta.is_folder(epath.Path(config.train.init_from)) else 0
        source = open_model(config.train.init_from, window=window)
        for field in dataclasses.fields(ModelConfig) if model else ():
            ours, theirs = getattr(model, field.name), getattr(source.config, field.name)
            if ours != theirs and field.name not in ("bos_token_id", "eos_token_id"):
                raise InputError(
                    f"model.{field.name} is {ours} but {config.train.init_from} has {theirs}: correct the config, or "
                    "leave `model` out of it"
                )
        model = source.config
    if model is None:
        raise InputError("neither model nor train.init_from is set: set one of them")
    extended = extend(model, config.rope)
    if extended.rope.kind == "default" and config.data.reach > extended.max_position_embeddings:
        # Direct fine-tuning: the model that leaves the run has the window that it was trained for.
        extended = dataclasses.replace(extended, max_position_embeddings=config.data.reach)
    return extended, source and dataclasses.replace(source, config=extended)


def _check_data(config: Config, model: ModelConfig, pipeline: Pipeline, tokenizer: str) -> None:
    if pipeline.largest_token >= model.vocab_size:
        store = next(store for store in pipeline.stores if store.largest_token >= model.vocab_size)
        token = load_tokenizer(store.tokenizer_dir).convert_ids_to_tokens(store.largest_token)
        raise InputError(
            f"{store.path} contains token {store.largest_token} ({token!r}), but the model's vocab_size is "
            f"{model.vocab_size}: prepare the text with the model's own tokenizer"
        )
    if tokenizer and _vocab_hash(tokenizer) not in (None, pipeline.vocab_hash):
        raise InputError(
            f"{config.data.sources[0]} was made with another tokenizer than that of {config.train.init_from}: "
            f"prepare the text with --tokenizer {tokenizer}"
        )
    if config.rope.kind != "default" and config.data.reach > model.max_position_embeddings:
        need = config.data.reach / model.original_window
        field = "pose_window" if config.data.pose_window else "window"
        raise InputError(
            f"data.{field} is {config.data.reach}, but rope.factor {config.rope.factor:g} stretches the base window of "
            f"{model.original_window} to {model.max_position_embeddings}: the factor must be at least {need:g}"
        )


def _vocab_hash(folder: str) -> str | None:
    if not any((pathlib.Path(folder) / name).is_file() for name in TOKENIZER_FILES):
        return None
    return TokenizerInfo.of(folder, load_tokenizer(folder).get_vocab()).vocab_hash
