"""Hugging Face folders: `config.json`, safetensors (one file or several), tokenizer files.

Reading is driven by the config: it says which names and shapes must be there, and the files may only agree. Weights
are read tensor by tensor, each host only its own slices. Nothing is ever unpickled, no code of a folder is run.
"""

import contextlib
import itertools
import json
import math
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import ml_dtypes  # noqa: F401  (teaches NumPy, and so safetensors, bfloat16)
import numpy as np
import safetensors
import safetensors.numpy

from pi_jax import rope, sharding, trees
from pi_jax.config import ComputeConfig, ModelConfig
from pi_jax.convert import weights
from pi_jax.errors import InputError
from pi_jax.model import Llama, abstract, parameter_axes

SHARD_BYTES = 5 * 10**9
TOKENIZER_FILES = (
    "tokenizer.json tokenizer.model tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json "
    "merges.txt chat_template.jinja chat_template.json"
).split()
GENERATION_FILE = "generation_config.json"
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
}
_MODEL_TYPES = ("llama", "mistral")


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
      InputError: if the file is missing or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a {type(value).__name__}: it must be a JSON object")
    return value


def read_config(folder: str) -> ModelConfig:
    """The architecture of a Hugging Face folder, from `config.json` of transformers 4 or 5.

    Raises:
      InputError: for a missing key, or a model that needs something not implemented here, naming key and value.
    """
    path = pathlib.Path(folder) / "config.json"
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


class Tensors:
    """The tensors of a folder, read lazily and only if the config asks for exactly these."""

    def __init__(self, folder: str, shapes: dict[str, tuple[int, ...]]):
        self._folder = pathlib.Path(folder)
        self._files = self._index()
        self._open: dict[pathlib.Path, Any] = {}
        ignored = {name for name in self._files if name.endswith(weights.HF_IGNORED)}
        if "lm_head.weight" not in shapes:
            ignored.add("lm_head.weight")  # some exporters write a tied head all the same
        missing, extra = set(shapes) - set(self._files), set(self._files) - set(shapes) - ignored
        if missing or extra:
            what = f"lacks {_some(missing)}" if missing else f"holds {_some(extra)}, which config.json does not ask for"
            raise InputError(f"{folder} {what}")
        for name, shape in shapes.items():
            found = tuple(self._slice(name).get_shape())
            if found != shape:
                raise InputError(f"{self._files[name]}: {name} has shape {found}, but config.json asks for {shape}")

    def _index(self) -> dict[str, pathlib.Path]:
        index, single = self._folder / "model.safetensors.index.json", self._folder / "model.safetensors"
        if index.exists():
            names = read_json(index).get("weight_map")
            if not isinstance(names, dict) or not names:
                raise InputError(f"{index} has no weight_map")
            return {tensor: self._shard(index, file) for tensor, file in names.items()}
        if single.exists():
            with self._safe_open(single) as file:
                return dict.fromkeys(file.keys(), single)
        raise InputError(f"{self._folder} has neither model.safetensors nor model.safetensors.index.json")

    def _shard(self, index: pathlib.Path, file: Any) -> pathlib.Path:
        # A name with a path in it could point anywhere on the disk.
        if not isinstance(file, str) or pathlib.PurePath(file).name != file or not file.endswith(".safetensors"):
            raise InputError(f"{index}: {file!r} is not the plain name of a .safetensors file")
        if not (self._folder / file).is_file():
            raise InputError(f"{index} names {file}, which is not there")
        return self._folder / file

    @staticmethod
    def _safe_open(path: pathlib.Path):
        try:
            return safetensors.safe_open(path, framework="np")
        except (OSError, safetensors.SafetensorError) as error:
            raise InputError(f"{path} is no whole safetensors file: {error}") from None

    def _slice(self, name: str):
        path = self._files[name]
        if path not in self._open:
            self._open[path] = self._safe_open(path)
        try:
            return self._open[path].get_slice(name)
        except safetensors.SafetensorError as error:
            raise InputError(f"{path}: {name} cannot be read: {error}") from None

    def read(self, name: str, index: tuple[slice, ...] = (slice(None),)) -> np.ndarray:
        """A tensor, or the part of it within `index`.

        Raises:
          InputError: if it is not of a floating dtype or holds values that are not finite.
        """
        array = self._slice(name)[index]
        if array.dtype.name not in ("float32", "float16", "bfloat16"):
            raise InputError(f"{self._files[name]}: {name} is {array.dtype.name}: weights must be floating point")
        if not np.isfinite(array.astype(np.float32)).all():
            raise InputError(f"{self._files[name]}: {name} holds values that are not finite")
        return array


def _some(names: set[str]) -> str:
    shown = sorted(names)[:3]
    return ", ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def load(folder: str, config: ModelConfig, compute: ComputeConfig, mesh: jax.sharding.Mesh) -> Llama:
    """The model of a folder, with its parameters split over the mesh as they are read.

    Args:
      folder: with `config.json` and safetensors.
      config: architecture; `read_config(folder)`, possibly with another `rope`.
      compute: `param_dtype` is the dtype that the parameters get.
      mesh: where they go.
    """
    template = abstract(config, compute)
    tensors = Tensors(folder, weights.hf_shapes(template))
    axes = parameter_axes(template)

    def read(name: str, index: tuple[slice, ...], shape: tuple[int, ...]) -> np.ndarray:
        hf_name = weights.HF_NAMES[name]
        if not name.startswith("layers."):
            return tensors.read(hf_name, weights.hf_index(name, index, shape)).astype(compute.param_dtype)
        part = weights.hf_index(name, index[1:], shape[1:])
        sizes = [len(range(*s.indices(size))) for s, size in zip(index[1:], shape[1:], strict=True)]
        layers = [tensors.read(hf_name.format(i), part) for i in range(*index[0].indices(shape[0]))]
        return np.stack([x.reshape(sizes) for x in layers]).astype(compute.param_dtype)

    return trees.map_with_name(
        lambda name, leaf: jax.make_array_from_callback(
            leaf.shape, sharding.named(mesh, axes[name]), lambda index: read(name, index, leaf.shape)
        ),
        template,
    )


def save(model: Llama, target: str, extras: str | None, dtype: str = "float32", shard_bytes: int = SHARD_BYTES) -> None:
    """Writes a model as a folder that transformers, vLLM, SGLang and llama.cpp read, reads it back and compares.

    The folder appears under its name only when it is whole and has been compared.

    Args:
      model: with all its parameters reachable from this process.
      target: the folder; must not exist.
      extras: folder to take tokenizer files and `generation_config.json` from, or None.
      dtype: of the written weights: "float32", "bfloat16" or "float16".
      shard_bytes: largest safetensors file; a single larger tensor gets its own.

    Raises:
      InputError: if the target exists or cannot be written, or what was read back differs.
    """
    with new_folder(target) as folder:
        _write_weights(model, folder, dtype, shard_bytes)
        (folder / "config.json").write_text(json.dumps(config_dict(model.config, dtype), indent=2) + "\n")
        if extras:
            copy_files(extras, folder, model.config.max_position_embeddings)
        if not (folder / GENERATION_FILE).exists():
            generation = {"bos_token_id": model.config.bos_token_id, "eos_token_id": model.config.eos_token_id}
            (folder / GENERATION_FILE).write_text(json.dumps(generation, indent=2) + "\n")
        _verify(model, folder, dtype)


def require_absent(target: str) -> pathlib.Path:
    """The path of a folder that is to be made, which must not exist yet."""
    path = pathlib.Path(target)
    if path.exists():
        raise InputError(f"{target} already exists: remove it or choose another name")
    return path


@contextlib.contextmanager
def new_folder(target: str):
    """A temporary folder beside `target` that becomes it if the body succeeds and vanishes if not."""
    path = require_absent(target)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    except OSError as error:
        raise InputError(f"{target} cannot be made: {error.strerror}") from None
    try:
        os.chmod(temporary, 0o755)
        yield temporary
        os.rename(temporary, path)
    except OSError as error:
        raise InputError(f"{target} cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def copy_files(source: str, target: pathlib.Path, window: int | None = None) -> None:
    """Copies tokenizer and generation settings byte for byte, but for `model_max_length`, which becomes `window`."""
    for name in (*TOKENIZER_FILES, GENERATION_FILE):
        file = pathlib.Path(source) / name
        if not file.is_file():
            continue
        if name == "tokenizer_config.json" and window:
            config = read_json(file) | {"model_max_length": window}
            (target / name).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        else:
            shutil.copyfile(file, target / name)


def _hf_tensors(model: Llama) -> Iterator[tuple[str, np.ndarray]]:
    for name, leaf in trees.by_name(model).items():
        array = np.asarray(leaf)
        if name.startswith("layers."):
            for i, layer in enumerate(array):
                yield weights.HF_NAMES[name].format(i), layer.reshape(weights.hf_shape(name, layer.shape))
        else:
            yield weights.HF_NAMES[name], array


def _write_weights(model: Llama, folder: pathlib.Path, dtype: str, shard_bytes: int) -> None:
    shapes = weights.hf_shapes(model)
    itemsize = np.dtype(dtype).itemsize
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():  # the order in which the tensors come
        nbytes = math.prod(shape) * itemsize
        if shards[-1] and size + nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    count = len(shards)
    files = [
        f"model-{i + 1:05d}-of-{count:05d}.safetensors" if count > 1 else "model.safetensors" for i in range(count)
    ]
    tensors = _hf_tensors(model)
    for file, names in zip(files, shards, strict=True):
        arrays = {
            name: np.ascontiguousarray(array.astype(dtype)) for name, array in itertools.islice(tensors, len(names))
        }
        assert list(arrays) == names
        safetensors.numpy.save_file(arrays, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # the library makes files that only their owner reads
    if count > 1:
        total = sum(math.prod(shape) for shape in shapes.values()) * itemsize
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _verify(model: Llama, folder: pathlib.Path, dtype: str) -> None:
    if read_config(str(folder)) != model.config:
        raise InputError(f"{folder}: config.json read back as {read_config(str(folder))}, not {model.config}")
    tensors = Tensors(str(folder), weights.hf_shapes(model))
    for name, array in _hf_tensors(model):
        if not np.array_equal(tensors.read(name), array.astype(dtype)):
            raise InputError(f"{folder}: {name} read back differs from what was written")
