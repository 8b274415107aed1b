import dataclasses
import pathlib

import jax

from pi_jax.config import BUILTIN, Config, ModelConfig, extend
from pi_jax.convert.folders import TOKENIZER_FILES
from pi_jax.convert.open import open_model
from pi_jax.data.pipeline import Pipeline
from pi_jax.errors import InputError
from pi_jax.model.loss import batch_loss
from pi_jax.train.abstract import abstract_batch, abstract_model, check_sizes


def with_builtin(config: Config, paths: dict[str, str]) -> Config:
    """The config with the paths that `builtin:tiny` stands for."""
    sources = tuple(paths["tokens"] if s == BUILTIN else s for s in config.data.sources)
    heldout = tuple(paths["heldout"] if s == BUILTIN else s for s in config.evaluate.data)
    base = paths["model"] if config.train.init_from == BUILTIN else config.train.init_from
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, sources=sources),
        evaluate=dataclasses.replace(config.evaluate, data=heldout),
        train=dataclasses.replace(config.train, init_from=base),
    )


def open_architecture(config: Config) -> tuple[ModelConfig, str]:
    """The architecture to train, extended as `rope` says, and the folder with its tokenizer ("": that of the data)."""
    model, files = config.model, ""
    if config.train.init_from:
        source = open_model(config.train.init_from, window=stated_window(model))
        files = source.tokenizer
        if model is not None:
            for field in dataclasses.fields(ModelConfig):
                ours, theirs = getattr(model, field.name), getattr(source.config, field.name)
                if ours != theirs and field.name not in ("bos_token_id", "eos_token_id"):
                    raise InputError(
                        f"model.{field.name} is {ours} but {config.train.init_from} has {theirs}: correct the config, "
                        "or leave `model` out of it"
                    )
        model = source.config
    if model is None:
        raise InputError("neither `model` nor train.init_from is given: say what to train")
    return extend(model, config.rope), files


def stated_window(model: ModelConfig | None) -> int:
    """The base window as the config states it, for Meta's folders, which do not; 0: it does not say."""
    return model.max_position_embeddings if model else 0


def check(config: Config, model: ModelConfig, pipeline: Pipeline, files: str, mesh: jax.sharding.Mesh) -> None:
    if pipeline.vocab_size > model.vocab_size:
        raise InputError(
            f"{config.data.sources[0]} was tokenized with {pipeline.vocab_size} tokens, but the model's vocab_size is "
            f"{model.vocab_size}: prepare the text with the model's own tokenizer"
        )
    if config.train.init_from and files and vocab_hash(files) not in (None, pipeline.vocab_hash):
        raise InputError(
            f"{config.data.sources[0]} was made with another tokenizer than that of {config.train.init_from}: "
            f"prepare the text with --tokenizer {files}"
        )
    if config.rope.kind != "default" and config.data.reach > model.max_position_embeddings:
        need = config.data.reach / model.original_window
        field = "pose_window" if config.data.pose_window else "window"
        raise InputError(
            f"data.{field} is {config.data.reach}, but rope.factor {config.rope.factor:g} stretches the base window of "
            f"{model.original_window} to {model.max_position_embeddings}: the factor must be at least {need:g}"
        )
    check_sizes(config, model, mesh)
    # One loss is traced, not computed: what an attention backend refuses is said before anything is written.
    with jax.set_mesh(mesh):
        jax.eval_shape(batch_loss, abstract_model(model, config.compute, mesh), abstract_batch(config.data, mesh))


def vocab_hash(files: str) -> str | None:
    from pi_jax.data.tokenizer import TokenizerInfo, load_tokenizer

    if not any((pathlib.Path(files) / name).is_file() for name in TOKENIZER_FILES):
        return None
    return TokenizerInfo.of(files, load_tokenizer(files).get_vocab()).vocab_hash
