"""Reads and writes Hugging Face folders: `config.json`, safetensors (one or several files), tokenizer files.

The config determines which tensors are required and their shapes; files that differ from it are rejected. Weights are
read one tensor at a time, and each host reads only its own slices. Nothing is unpickled and no code in a folder is run.
"""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
from etils import epath

from pi_jax import log, rope
from pi_jax.atomic import new_folder
from pi_jax.config import ComputeConfig, ModelConfig
from pi_jax.convert import model_card, param_mapping, pipeline, sharded_load
from pi_jax.convert.folders import GENERATION_FILE, copy_files, read_json, write_json
from pi_jax.convert.formats import safetensors
from pi_jax.convert.verify import readback
from pi_jax.errors import InputError, some
from pi_jax.model import Llama

SHARD_BYTES = 5 * 10**9
"""Default maximum size of a safetensors file, in bytes."""
_INDEX, _SINGLE, _ADAPTER = "model.safetensors.index.json", "model.safetensors", "adapter_config.json"
_REQUIRED = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads".split()
# Features that are not implemented: each config key with the only value that does not change the result.
_UNSUPPORTED = {
    "attention_bias": False,
    "mlp_bias": False,
    "sliding_window": None,
    "quantization_config": None,
    "partial_rotary_factor": 1.0,
    "hidden_act": "silu",
    "num_local_experts": None,
    "num_experts": None,
    "auto_map": None,
}
_MISTRAL = ("sliding_window", "num_key_value_heads", "max_position_embeddings")
_MODEL_TYPES = ("llama", "mistral")
_THETA_SINCE = (4, 33)  # first version of transformers that writes rope_theta


def read_config(folder: str, name: str = "config.json", window: int = 0) -> ModelConfig:
    """Reads the architecture from the `config.json` of a Hugging Face folder, as written by transformers 4 or 5.

    What ends a text may stand only in `generation_config.json`, as in Llama 3 Instruct: those tokens are added.

    Args:
      folder: Hugging Face folder.
      name: name of the file.
      window: extended window in tokens, if the file states another or none; 0 trusts the file.

    Raises:
      InputError: if a key is missing or has a value that is not supported; the message names both.
    """
    path = epath.Path(folder) / name
    config = read_json(path)
    if config.get("model_type") not in _MODEL_TYPES:
        known = " or ".join(_MODEL_TYPES)
        raise InputError(f"{path}: model_type is {config.get('model_type')!r:.80}: it must be {known}")
    for key, harmless in _UNSUPPORTED.items():
        if config.get(key) not in (None, harmless):
            raise InputError(f"{path}: {key} is {config[key]!r:.80}: only {harmless!r} is supported")
    missing = [key for key in _REQUIRED if config.get(key) is None]
    if config["model_type"] == "mistral":  # whose defaults are those of Mistral 7B, sliding window included
        missing += [key for key in _MISTRAL if key not in config]
    if missing:
        raise InputError(f"{path} lacks {', '.join(missing)}")
    for key in (*_REQUIRED, *(key for key in ("num_key_value_heads", "head_dim") if config.get(key) is not None)):
        if type(config[key]) is not int or config[key] < 1:
            raise InputError(f"{path}: {key} is {config[key]!r:.80}: it must be a positive integer")
    _require_theta(path, config)
    try:
        scaling = rope.from_hf(config)
        if window:
            config = _with_window(config, scaling, window)
        tokenizer = epath.Path(folder) / "tokenizer_config.json"
        limit = read_json(tokenizer).get("model_max_length") if tokenizer.is_file() else None
        windows = rope.window_from_hf(config, scaling, limit)
        heads = config["num_attention_heads"]
        bos = _tokens("bos_token_id", config.get("bos_token_id", 1))
        model = ModelConfig(
            **{key: config[key] for key in _REQUIRED},
            num_key_value_heads=_given(config, "num_key_value_heads", heads),
            head_dim=config["hidden_size"] // heads if config.get("head_dim") is None else config["head_dim"],
            max_position_embeddings=windows.tokens,
            original_max_position_embeddings=windows.original,
            rms_norm_eps=_given(config, "rms_norm_eps", 1e-6),
            tie_word_embeddings=_given(config, "tie_word_embeddings", False),
            rope=scaling,
            bos_token_id=bos[0] if isinstance(bos, tuple) else bos,
            eos_token_id=_end_tokens(path, config),
        )
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (TypeError, ZeroDivisionError, OverflowError) as error:
        raise InputError(f"{path} has a value of the wrong type: {error}") from None
    if windows.assumed:
        log.note(
            f"{path} has linear scaling by {scaling.factor:g} and max_position_embeddings "
            f"{config.get('max_position_embeddings')}, which may be the window before or after it: {windows.tokens} "
            "tokens are assumed; add max_sequence_length, the original window, if that is wrong"
        )
    return model


def _given(config: dict[str, Any], key: str, default: Any) -> Any:
    """A value of config.json; null means the default."""
    return default if config.get(key) is None else config[key]


def _with_window(config: dict[str, Any], scaling: rope.Scaling, window: int) -> dict[str, Any]:
    if scaling.kind == "default":
        return config | {"max_position_embeddings": window}
    if scaling.kind == "linear":
        return config | {"max_position_embeddings": window, "max_sequence_length": int(window / scaling.factor)}
    raise InputError(f"--max-position-embeddings is {window}, but rope_type {scaling.kind!r} states the window")


def _end_tokens(path: epath.Path, config: dict[str, Any]) -> int | tuple[int, ...] | None:
    """The tokens that end a text, by config.json and generation_config.json."""
    found = _tokens("eos_token_id", config.get("eos_token_id", 2))  # an absent key has transformers' default
    beside = path.parent / GENERATION_FILE
    if not beside.is_file():
        return found
    more = _tokens(f"eos_token_id of {GENERATION_FILE}", read_json(beside).get("eos_token_id"))
    own, other = (() if x is None else x if isinstance(x, tuple) else (x,) for x in (found, more))
    if set(other) <= set(own):
        return found
    if own:
        log.note(f"{path} has eos_token_id {found}, {GENERATION_FILE} {more}: any of them ends a text")
    together = tuple(dict.fromkeys((*own, *other)))
    return together if len(together) > 1 else together[0]


def open_config(folder: str, window: int = 0) -> ModelConfig:
    """Like `read_config`, but keeps an output head of its own in a model that config.json calls tied.

    transformers 5 loads such a head, which merging LoRA weights can leave, while transformers 4 drops it.

    Raises:
      InputError: as `read_config`, or if the folder is ambiguous: one file of weights beside an index of others, or
        an adapter that was not merged.
    """
    config = read_config(folder, window=window)
    path = epath.Path(folder)
    if (path / _ADAPTER).is_file():
        raise InputError(f"{folder} contains {_ADAPTER}, an adapter beside the weights: merge it or move it away")
    if not any((path / name).exists() for name in (_INDEX, _SINGLE)):
        return config  # without weights, as for a plan
    files = _Files(path)
    if config.tie_word_embeddings and not files.head_is_embedding():
        log.note(
            f"{folder}/config.json ties the output head to the embedding, but lm_head.weight differs from it: it is "
            "kept as a head of its own, as in transformers 5"
        )
        return dataclasses.replace(config, tie_word_embeddings=False)
    return config


def _require_theta(path: epath.Path, config: dict[str, Any]) -> None:
    """Checks that `rope_theta` is present. Only in files older than the key does its absence mean 10000."""
    places = (config, config.get("rope_parameters"), config.get("rope_scaling"))
    if any(isinstance(place, dict) and place.get("rope_theta") is not None for place in places):
        return
    version = str(config.get("transformers_version", "")).split(".")[:2]
    if len(version) == 2 and all(v.isdigit() for v in version) and tuple(map(int, version)) < _THETA_SINCE:
        return
    raise InputError(
        f"{path} has no rope_theta, which transformers writes since version 4.33: add the value that the model was "
        'trained with ("rope_theta": 10000.0 for LLaMA 1 and 2)'
    )


def _tokens(key: str, stated: Any) -> int | tuple[int, ...] | None:
    """Token ids of a config; None if there are none."""
    tokens = stated if isinstance(stated, list) else [] if stated is None else [stated]
    if not all(type(token) is int for token in tokens):
        raise InputError(f"{key} is {stated!r:.80}: it must be a token id or a list of them")
    return (tuple(tokens) or None) if isinstance(stated, list) else stated


def config_dict(model: ModelConfig, dtype: str) -> dict[str, Any]:
    """Returns a `config.json` that transformers 4 and 5, vLLM, SGLang and llama.cpp all read correctly."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_hidden_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_key_value_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": model.rms_norm_eps,
        "initializer_range": 0.02,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": model.tie_word_embeddings,
        **rope.window_to_hf(model.rope, model.max_position_embeddings, model.original_max_position_embeddings),
        **rope.to_hf(model.rope),
        "bos_token_id": model.bos_token_id,
        "eos_token_id": model.eos_token_id,
        "use_cache": True,
        "torch_dtype": dtype,
    }


class _Files:
    """The safetensors files of a folder, opened when they are read."""

    def __init__(self, folder: epath.Path):
        self._folder = folder
        self._open: dict[epath.Path, safetensors.File] = {}
        self.of = self._index()
        """File of each tensor."""

    def _index(self) -> dict[str, epath.Path]:
        index, single = self._folder / _INDEX, self._folder / _SINGLE
        if index.exists():
            names = read_json(index).get("weight_map")
            if not isinstance(names, dict) or not names:
                raise InputError(f"{index} has no weight_map")
            found = {tensor: self._shard(index, file) for tensor, file in names.items()}
            if single.exists() and single not in found.values():
                raise InputError(
                    f"{self._folder} contains {_SINGLE} and {_INDEX}, which lists other files: remove the weights that "
                    "are out of date"
                )
            return found
        if single.exists():
            self._open[single] = safetensors.File(single)
            return dict.fromkeys(self._open[single].entries, single)
        raise InputError(f"{self._folder} has neither {_SINGLE} nor {_INDEX}")

    def _shard(self, index: epath.Path, file: Any) -> epath.Path:
        # A name that contains a path could point anywhere on the disk.
        if not isinstance(file, str) or pathlib.PurePath(file).name != file or not file.endswith(".safetensors"):
            raise InputError(f"{index} lists {file!r}: it must be the name of a .safetensors file in the same folder")
        if not (self._folder / file).is_file():
            raise InputError(f"{index} lists {file}, which does not exist")
        return self._folder / file

    def file(self, name: str) -> safetensors.File:
        """The file that contains a tensor."""
        path = self.of[name]
        if path not in self._open:
            self._open[path] = safetensors.File(path)
        if name not in self._open[path].entries:
            raise InputError(f"{path} lacks {name}, although {_INDEX} lists it there")
        return self._open[path]

    def head_is_embedding(self) -> bool:
        """Whether the output head is absent or a copy of the embedding."""
        names = ("model.embed_tokens.weight", "lm_head.weight")
        if not all(name in self.of for name in names):
            return True
        files = [self.file(name) for name in names]
        shapes = [file.entries[name].shape for name, file in zip(names, files, strict=True)]
        if shapes[0] != shapes[1]:
            return False
        for start in range(0, shapes[0][0], 4096):
            rows = (slice(start, start + 4096), *(slice(None),) * (len(shapes[0]) - 1))
            ours, head = (file.read(name, rows) for name, file in zip(names, files, strict=True))
            if not np.array_equal(ours.astype(np.float32), head.astype(np.float32)):
                return False
        return True


class Reader:
    """Reads the tensors of a folder lazily."""

    def __init__(self, folder: str, config: ModelConfig):
        """Opens the files and checks names, shapes and dtypes against the config.

        Raises:
          InputError: if a tensor or file is missing, unexpected or damaged.
        """
        self._files = _Files(epath.Path(folder))
        self.order = param_mapping.tensors(config)
        wanted = {tensor.name: tensor for tensor in self.order}
        ignored = {name for name in self._files.of if name.endswith(param_mapping.HF_IGNORED)}
        if config.tie_word_embeddings:
            ignored.add("lm_head.weight")  # a copy of the embedding: see `open_config`
        require_names(folder, set(wanted), set(self._files.of) - ignored, "config.json")
        self.dtypes: pipeline.Dtypes = {}
        for name, tensor in wanted.items():
            file = self._files.file(name)
            require_shape(f"{file.path}: {name}", file.entries[name].shape, tensor.shape, "config.json")
            pipeline.require_float(str(file.path), name, file.entries[name].dtype)
            self.dtypes[name] = np.dtype(file.entries[name].dtype)

    def read(self, tensor: param_mapping.Tensor, index: param_mapping.Index = (...,)) -> np.ndarray:
        """See `pipeline.Reader`."""
        return self._files.file(tensor.name).read(tensor.name, index)


def require_names(folder: Any, wanted: set[str], found: set[str], asker: str) -> None:
    """Checks that a folder contains exactly the tensors of the model described by the file `asker`."""
    missing, extra = wanted - found, found - wanted
    if missing or extra:
        what = (
            f"lacks {some(sorted(missing))}"
            if missing
            else f"contains {some(sorted(extra))}, which the model in {asker} lacks"
        )
        raise InputError(f"{folder} {what}")


def require_shape(what: str, found: tuple[int, ...], wanted: tuple[int, ...], asker: str) -> None:
    """Checks that the shape of a tensor is the one that the file `asker` implies."""
    if found != wanted:
        raise InputError(f"{what} has shape {found}, but {asker} requires {wanted}")


def require_same(folder: str, found: ModelConfig, wanted: ModelConfig) -> None:
    """Checks that the config of a written folder reads back unchanged."""
    if found != wanted:
        raise InputError(f"{folder}: the config is {found} when it is read back, but {wanted} was written")


def load(folder: str, config: ModelConfig, compute: ComputeConfig, mesh: jax.sharding.Mesh) -> Llama:
    """Loads a model from a folder and shards its parameters over the mesh while they are read.

    Args:
      folder: folder with `config.json` and safetensors files.
      config: architecture; `read_config(folder)`, possibly with another `rope`.
      compute: `param_dtype` is the dtype of the loaded parameters.
      mesh: devices over which to shard them.
    """
    return sharded_load.load(Reader(folder, config), config, compute, mesh)


def save(
    model: Llama,
    target: str,
    extras: str | None,
    dtype: str = "same",
    shard_bytes: int = SHARD_BYTES,
    facts: model_card.Facts = model_card.Facts(),
    weights: pipeline.Reader | None = None,
) -> None:
    """Writes a model as a folder that transformers, vLLM, SGLang and llama.cpp can read, and verifies it.

    The folder gets its name only after all tensors have been read back and compared.

    Args:
      model: the model; all its parameters must be addressable from this process unless `weights` is given.
      target: folder to create; it must not exist.
      extras: folder from which to copy tokenizer files and `generation_config.json`, or None.
      dtype: dtype of the written weights: "float32", "bfloat16", "float16", or "same" as the model.
      shard_bytes: maximum size of a safetensors file; a larger tensor gets its own file.
      facts: facts for the model card.
      weights: reader of the model's weights, to read them from a checkpoint instead of from `model`.

    Raises:
      InputError: if the target exists, cannot be written or differs from the model when it is read back.
    """
    reader = pipeline.Cast(weights or sharded_load.Reader(model), dtype)
    with new_folder(target) as folder:
        write(reader, model.config, folder, shard_bytes, facts, extras, quiet=True)


def write(
    reader: pipeline.Reader,
    config: ModelConfig,
    folder: epath.Path,
    shard_bytes: int,
    facts: model_card.Facts,
    extras: str | None,
    verify: bool = True,
    quiet: bool = False,
) -> None:
    """Writes a model into an empty folder and, if `verify` is true, reads it back and compares it; see `save`."""
    dtypes = reader.dtypes
    digests = pipeline.copy(reader, safetensors.Writer(folder, reader.order, dtypes, shard_bytes), verify, quiet)
    write_json(folder / "config.json", config_dict(config, pipeline.main_dtype(dtypes)))
    if extras:
        copy_files(extras, folder, config.max_position_embeddings)
    if not (folder / GENERATION_FILE).exists():
        generation = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
        write_json(folder / GENERATION_FILE, generation)
    (folder / "README.md").write_text(model_card.text(config, pipeline.main_dtype(dtypes), facts), encoding="utf-8")
    if verify:
        require_same(str(folder), read_config(str(folder)), config)
        Reader(str(folder), config)  # checks names and shapes
        pipeline.verify(str(folder), digests, reader.order, dtypes, readback.hf(folder), quiet)
