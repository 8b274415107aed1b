"""Hugging Face folders: `config.json`, safetensors (one file or several), tokenizer files.

Reading is driven by the config: it says which names and shapes must be there, and the files may only agree. Weights
are read tensor by tensor, each host only its own slices. Nothing is ever unpickled, no code of a folder is run.
"""

import pathlib
from typing import Any

import jax
import numpy as np
from etils import epath

from pi_jax import rope
from pi_jax.config import ComputeConfig, ModelConfig
from pi_jax.convert import model_card, param_mapping, pipeline, sharded_load
from pi_jax.convert.folders import (
    GENERATION_FILE,
    copy_files,
    new_folder,
    read_json,
    write_json,
)
from pi_jax.convert.formats import safetensors
from pi_jax.convert.verify import readback
from pi_jax.errors import InputError, some
from pi_jax.model import Llama

SHARD_BYTES = 5 * 10**9
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_REQUIRED = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads".split()
# What we do not compute: the value that is harmless, for each key that would change the result otherwise.
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
_MODEL_TYPES = ("llama", "mistral")
_THETA_SINCE = (4, 33)  # the version of transformers that began to write rope_theta


def read_config(folder: str, name: str = "config.json") -> ModelConfig:
    """The architecture of a Hugging Face folder, from `config.json` of transformers 4 or 5.

    Raises:
      InputError: for a missing key, or a model that needs something not implemented here, naming key and value.
    """
    path = epath.Path(folder) / name
    config = read_json(path)
    if config.get("model_type") not in _MODEL_TYPES:
        known = " or ".join(_MODEL_TYPES)
        raise InputError(f"{path}: model_type is {config.get('model_type')!r}: only {known} is supported")
    for key, harmless in _UNSUPPORTED.items():
        if config.get(key, harmless) != harmless:
            raise InputError(f"{path}: {key} is {config[key]!r}, which is not supported (only {harmless!r})")
    missing = [key for key in _REQUIRED if key not in config]
    if missing:
        raise InputError(f"{path}: {', '.join(missing)} missing")
    _require_theta(path, config)
    heads = config["num_attention_heads"]
    try:
        scaling = rope.from_hf(config)
        window, original = rope.window_from_hf(config, scaling)
        return ModelConfig(
            **{key: config[key] for key in _REQUIRED},
            num_key_value_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            max_position_embeddings=window,
            original_max_position_embeddings=original,
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            tie_word_embeddings=config.get("tie_word_embeddings", False),
            rope=scaling,
            bos_token_id=_first(config.get("bos_token_id")),
            eos_token_id=_tokens(config.get("eos_token_id")),
        )
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except TypeError as error:
        raise InputError(f"{path} has a value of the wrong type: {error}") from None


def _require_theta(path: epath.Path, config: dict[str, Any]) -> None:
    """Files older than the key mean 10000; in newer ones its absence is a loss, and the model would read as noise."""
    places = (config, config.get("rope_parameters"), config.get("rope_scaling"))
    if any(isinstance(place, dict) and place.get("rope_theta") is not None for place in places):
        return
    version = str(config.get("transformers_version", "")).split(".")[:2]
    if len(version) == 2 and all(v.isdigit() for v in version) and tuple(map(int, version)) < _THETA_SINCE:
        return
    raise InputError(
        f"{path} has no rope_theta, which every writer since transformers 4.33 states: add the one that the model was "
        'trained with ("rope_theta": 10000.0 for LLaMA 1 and 2)'
    )


def _first(token: int | list[int] | None) -> int | None:
    return token[0] if isinstance(token, list) and token else token


def _tokens(token: int | list[int] | None) -> int | tuple[int, ...] | None:
    return tuple(token) if isinstance(token, list) else token


def config_dict(model: ModelConfig, dtype: str) -> dict[str, Any]:
    """`config.json` in the form that transformers 4 and 5, vLLM, SGLang and llama.cpp all read correctly."""
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


class Reader:
    """The tensors of a folder, read lazily and only if the config asks for exactly these."""

    def __init__(self, folder: str, config: ModelConfig):
        """Opens the files and checks names, shapes and dtypes.

        Raises:
          InputError: for a missing, unexpected or broken tensor or file.
        """
        self._folder = epath.Path(folder)
        self._open: dict[epath.Path, safetensors.File] = {}
        self._files = self._index()
        self.order = param_mapping.tensors(config)
        wanted = {tensor.name: tensor for tensor in self.order}
        ignored = {name for name in self._files if name.endswith(param_mapping.HF_IGNORED)}
        if config.tie_word_embeddings:
            ignored.add("lm_head.weight")  # some exporters write a tied head all the same
        require_names(folder, set(wanted), set(self._files) - ignored, "config.json")
        self.dtypes: pipeline.Dtypes = {}
        for name, tensor in wanted.items():
            file = self._file(name)
            if name not in file.entries:
                raise InputError(f"{file.path} lacks {name}, which {_INDEX} says it holds")
            require_shape(f"{file.path}: {name}", file.entries[name].shape, tensor.shape, "config.json")
            pipeline.require_float(str(file.path), name, file.entries[name].dtype)
            self.dtypes[name] = np.dtype(file.entries[name].dtype)

    def _index(self) -> dict[str, epath.Path]:
        index, single = self._folder / _INDEX, self._folder / _SINGLE
        if index.exists():
            names = read_json(index).get("weight_map")
            if not isinstance(names, dict) or not names:
                raise InputError(f"{index} has no weight_map")
            return {tensor: self._shard(index, file) for tensor, file in names.items()}
        if single.exists():
            self._open[single] = safetensors.File(single)
            return dict.fromkeys(self._open[single].entries, single)
        raise InputError(f"{self._folder} has neither {_SINGLE} nor {_INDEX}")

    def _shard(self, index: epath.Path, file: Any) -> epath.Path:
        # A name with a path in it could point anywhere on the disk.
        if not isinstance(file, str) or pathlib.PurePath(file).name != file or not file.endswith(".safetensors"):
            raise InputError(f"{index}: {file!r} is not the plain name of a .safetensors file")
        if not (self._folder / file).is_file():
            raise InputError(f"{index} names {file}, which is not there")
        return self._folder / file

    def _file(self, name: str) -> safetensors.File:
        path = self._files[name]
        if path not in self._open:
            self._open[path] = safetensors.File(path)
        return self._open[path]

    def read(self, tensor: param_mapping.Tensor, index: param_mapping.Index = (...,)) -> np.ndarray:
        """See `stream.Reader`."""
        return self._file(tensor.name).read(tensor.name, index)


def require_names(folder: Any, wanted: set[str], found: set[str], asker: str) -> None:
    """Checks that the tensors there are just those that a config asks for."""
    missing, extra = wanted - found, found - wanted
    if missing or extra:
        unasked = f"holds {some(sorted(extra))}, which {asker} does not ask for"
        raise InputError(f"{folder} {f'lacks {some(sorted(missing))}' if missing else unasked}")


def require_shape(what: str, found: tuple[int, ...], wanted: tuple[int, ...], asker: str) -> None:
    """Checks the shape of a tensor."""
    if found != wanted:
        raise InputError(f"{what} has shape {found}, but {asker} asks for {wanted}")


def require_same(folder: str, found: ModelConfig, wanted: ModelConfig) -> None:
    """Checks that a written folder's config reads back as what was meant."""
    if found != wanted:
        raise InputError(f"{folder}: the config read back as {found}, not {wanted}")


def load(folder: str, config: ModelConfig, compute: ComputeConfig, mesh: jax.sharding.Mesh) -> Llama:
    """The model of a folder, with its parameters split over the mesh as they are read.

    Args:
      folder: with `config.json` and safetensors.
      config: architecture; `read_config(folder)`, possibly with another `rope`.
      compute: `param_dtype` is the dtype that the parameters get.
      mesh: where they go.
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
    """Writes a model as a folder that transformers, vLLM, SGLang and llama.cpp read, reads it back and compares.

    The folder appears under its name only when it is whole and has been compared.

    Args:
      model: with all its parameters reachable from this process, unless `weights` are given.
      target: the folder; must not exist.
      extras: folder to take tokenizer files and `generation_config.json` from, or None.
      dtype: of the written weights: "float32", "bfloat16", "float16", or "same" as the model's.
      shard_bytes: largest safetensors file; a single larger tensor gets its own.
      facts: for the model card.
      weights: where to read the model's weights instead, for example in its checkpoint.

    Raises:
      InputError: if the target exists or cannot be written, or what was read back differs.
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
    """Fills an empty folder from a reader and, with `verify`, compares what then lies there; see `save`."""
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
        Reader(str(folder), config)  # names and shapes
        pipeline.verify(str(folder), digests, reader.order, dtypes, readback.hf(folder), quiet)
