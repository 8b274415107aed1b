"""Reads and writes Meta's folders, the format of LLaMA 1, 2 and 3: `params.json` and `consolidated.NN.pth` files.

`params.json` is incomplete: it does not state the window, RoPE scaling other than Llama 3's, or whether the output head
is tied. A folder written by pi_jax also contains `hf_config.json`, in Hugging Face's format, which is complete. For
other folders these rules apply:

- window: 2048 where each layer has `rope.freqs` (LLaMA 1), 4096 (LLaMA 2), 16384 where theta is above 10000 (Code
  Llama), 8192 with a vocabulary above 100,000 (Llama 3), 131072 with `use_scaled_rope` (Llama 3.1 and later);
- `use_scaled_rope`: 'llama3' with factor 8 from a window of 8192; 32 in models of at most 3072 channels (Llama 3.2);
- tied: where `output.weight` is absent or equal to `tok_embeddings.weight`.
"""

import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from etils import epath

from pi_jax import log
from pi_jax.atomic import is_remote
from pi_jax.config import ModelConfig
from pi_jax.convert import param_mapping, pipeline
from pi_jax.convert.folders import copy_files, read_json, write_json
from pi_jax.convert.formats import hf, pth
from pi_jax.convert.verify import readback
from pi_jax.errors import InputError
from pi_jax.rope import Default, Llama3, Scaling

PARAMS = "params.json"
"""File with the architecture, in Meta's format."""
SIDECAR = "hf_config.json"
"""File with the complete config, in Hugging Face's format, in folders that pi_jax wrote."""
_LLAMA3_VOCABULARY = 100_000
_COUNTS = ("dim", "n_layers", "n_heads", "multiple_of")
_REQUIRED = ("dim", "n_layers", "n_heads", "norm_eps")
_KNOWN = (
    *_REQUIRED,
    *"n_kv_heads vocab_size multiple_of ffn_dim_multiplier hidden_dim head_dim rope_theta use_scaled_rope".split(),
    *"rope_scaling_factor max_seq_len max_batch_size sliding_window".split(),
)
# Pairs of multiple_of and ffn_dim_multiplier in Meta's releases; tried in this order to reproduce released files.
_FEED_FORWARD = ((256, None), (256, 1.5), (4096, 1.3), (1024, 1.3), (4096, 1.2))


@dataclasses.dataclass(frozen=True)
class MetaOptions:
    """Options for a target in Meta's format."""

    files: int = 1
    """Number of consolidated.NN.pth files to write. LLaMA's own code expects one per device."""
    embedding: Literal["auto", "rows", "columns"] = "auto"
    """How to split the embedding of a target over the files: by 'columns' (LLaMA 1 and 2) or 'rows' (Llama 3). 'auto'
    selects rows if the vocabulary is larger than 100,000."""

    def __post_init__(self):
        if self.files < 1:
            raise InputError(f"meta.files is {self.files}: it must be positive")


def is_folder(folder: Any) -> bool:
    """Whether a folder is in Meta's format."""
    return (folder / PARAMS).is_file()


def feed_forward(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """Width of the feed-forward layer, as Meta's code computes it."""
    width = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        width = int(multiplier * width)
    return multiple_of * ((width + multiple_of - 1) // multiple_of)


class Folder:
    """A folder in Meta's format: its params.json and its open `.pth` files."""

    def __init__(self, path: str):
        """Reads params.json and the lists of tensors in the files.

        Raises:
          InputError: if a file is missing, damaged or not supported.
        """
        if is_remote(path):
            raise InputError(f"{path} is remote: .pth files can be read from a local folder only")
        self.path = pathlib.Path(path)
        self.params = read_json(self.path / PARAMS)
        if isinstance(nested := self.params.get("model"), dict):
            log.note(f"{self.path / PARAMS} has its values under 'model'")
            self.params = nested
        for key in _REQUIRED:
            if self.params.get(key) is None:
                raise InputError(f"{self.path / PARAMS} lacks {key}")
        for key, value in self.params.items():
            if (key not in _KNOWN and value) or (key == "sliding_window" and value):
                raise InputError(f"{self.path / PARAMS}: {key} is {value!r:.80}, which is not supported")
        found = sorted(self.path.glob("consolidated.*.pth"))
        if [p.name for p in found] != [f"consolidated.{i:02d}.pth" for i in range(len(found))] or not found:
            names = ", ".join(p.name for p in found) or "none"
            raise InputError(f"{path} contains {names}: it must contain consolidated.00.pth and so on without gaps")
        self.files = [pth.File(p) for p in found]

    def names(self, file: pth.File) -> set[str]:
        """Returns the names of the tensors in a file, without those that are not weights."""
        return {name for name in file.entries if not name.endswith(param_mapping.META_IGNORED)}

    def joined(self, name: str, split: int | None) -> pth.Joined:
        """Returns a tensor joined over all files. An embedding is split by rows if its parts are as wide as a norm."""
        if name == "tok_embeddings.weight":
            norm, part = (self.files[0].entries.get(n) for n in ("norm.weight", name))
            split = 0 if norm and part and norm.shape == part.shape[1:] else 1
        return pth.Joined(self.files, name, split)

    def config(self, window: int = 0, eos: Sequence[int] = ()) -> ModelConfig:
        """Returns the architecture. What params.json does not state is assumed and printed.

        Args:
          window: trained window in tokens; 0 applies the rules in the module docstring.
          eos: tokens that end a text; empty: those of the base models.

        Raises:
          InputError: if a value is missing, invalid or not supported; the message names its key.
        """
        path = self.path / PARAMS
        try:
            config = self._config(window)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        except (TypeError, ValueError, ArithmeticError) as error:
            raise InputError(f"{path} has a value of the wrong type: {error}") from None
        sidecar = self.path / SIDECAR
        if not sidecar.is_file():
            self._say_assumptions(config, window, eos)
            return config
        stated = hf.read_config(str(self.path), SIDECAR)
        for field in dataclasses.fields(ModelConfig):
            ours, theirs = getattr(config, field.name), getattr(stated, field.name)
            if field.name in _SHARED and ours != theirs:
                raise InputError(f"{sidecar}: {field.name} is {theirs}, but {PARAMS} says {ours}")
        if stated.rope.theta != config.rope.theta:
            raise InputError(f"{sidecar}: theta is {stated.rope.theta}, but {PARAMS} says {config.rope.theta}")
        return stated

    def _say_assumptions(self, config: ModelConfig, window: int, eos: Sequence[int]) -> None:
        path = self.path / PARAMS
        if not window:
            log.note(
                f"{path} does not state the window: {config.max_position_embeddings} tokens are assumed by the rules "
                "in docs/convert.md; override it with `convert --max-position-embeddings`"
            )
        if not eos:
            several = config.vocab_size > _LLAMA3_VOCABULARY
            instruct = "128001 128008 128009 for an instruct model" if several else "TOKEN if it has another"
            log.note(
                f"{path} does not state what ends a text: token {config.eos_token_id} is assumed; "
                f"`convert --eos` sets it, {instruct}"
            )

    def _config(self, window: int) -> ModelConfig:
        params = self.params
        dim, heads = params["dim"], params["n_heads"]
        vocabulary = params.get("vocab_size", -1)
        if vocabulary == -1:  # LLaMA 1 took the size from the tokenizer
            vocabulary = self._rows("output.weight" if self._has("output.weight") else "tok_embeddings.weight")
        for key, value in params.items():
            if value is None:
                continue
            if key in _COUNTS:
                fits, wanted = type(value) is int and value > 0, "a positive integer"
            elif key == "use_scaled_rope":
                fits, wanted = type(value) is bool, "true or false"
            else:
                fits, wanted = type(value) in (int, float) and math.isfinite(value), "a finite number"
            if not fits:
                raise InputError(f"{key} is {value!r:.80}: it must be {wanted}")
        theta = float(params.get("rope_theta") or 10000.0)
        scaled = bool(params.get("use_scaled_rope"))
        width = params.get("hidden_dim") or feed_forward(
            dim, params.get("multiple_of", 256), params.get("ffn_dim_multiplier")
        )
        window = window or self._window(vocabulary, theta, scaled)
        scaling: Scaling = Default(theta)
        if scaled:
            factor = float(params.get("rope_scaling_factor") or (32.0 if dim <= 3072 else 8.0))
            scaling = Llama3(
                theta=theta,
                factor=factor,
                original_max_position_embeddings=8192,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
            )
        llama3 = vocabulary > _LLAMA3_VOCABULARY
        return ModelConfig(
            vocab_size=vocabulary,
            hidden_size=dim,
            intermediate_size=width,
            num_hidden_layers=params["n_layers"],
            num_attention_heads=heads,
            num_key_value_heads=params.get("n_kv_heads") or heads,
            head_dim=params.get("head_dim") or dim // heads,
            max_position_embeddings=window,
            original_max_position_embeddings=8192 if scaled and window > 8192 else None,
            rms_norm_eps=params["norm_eps"],
            tie_word_embeddings=self._tied(),
            rope=scaling,
            bos_token_id=128000 if llama3 else 1,
            eos_token_id=128001 if llama3 else 2,
        )

    def _has(self, name: str) -> bool:
        return name in self.files[0].entries

    def _rows(self, name: str) -> int:
        if not self._has(name):
            raise InputError(f"vocab_size is missing, and consolidated.00.pth lacks {name}")
        rows = self.files[0].entries[name].shape[0]
        return rows * len(self.files) if name == "output.weight" else rows

    def _window(self, vocabulary: int, theta: float, scaled: bool) -> int:
        if scaled:
            return 131072
        if vocabulary > _LLAMA3_VOCABULARY:
            return 8192
        if theta > 10000:
            return 16384
        llama1 = any(name.endswith("attention.inner_attention.rope.freqs") for name in self.files[0].entries)
        return 2048 if llama1 else 4096

    def _tied(self) -> bool:
        if not self._has("output.weight"):
            return True
        embedding = self.joined("tok_embeddings.weight", 1)
        head = self.joined("output.weight", 0)
        if embedding.shape != head.shape or embedding.dtype != head.dtype:
            return False
        for start in range(0, embedding.shape[0], 1024):  # untied weights differ in the first rows already
            rows = (slice(start, min(start + 1024, embedding.shape[0])), slice(None))
            if embedding.read(rows).tobytes() != head.read(rows).tobytes():
                return False
        return True


_SHARED = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "rms_norm_eps tie_word_embeddings"
).split()


class Reader:
    """Reads the tensors of a Meta folder lazily, joined over the files and in Hugging Face's row order."""

    def __init__(self, folder: Folder, config: ModelConfig):
        """Checks names, shapes and dtypes against the config.

        Raises:
          InputError: if a tensor is missing, unexpected or has the wrong shape.
        """
        self._config = config
        self.order = param_mapping.tensors(config)
        wanted = {tensor.meta_name for tensor in self.order}
        for file in folder.files:
            found = folder.names(file) - ({"output.weight"} if config.tie_word_embeddings else set())
            hf.require_names(file.path, wanted, found, PARAMS)
        self._joined = {t.name: folder.joined(t.meta_name, t.spec.meta_split) for t in self.order}
        for tensor in self.order:
            joined = self._joined[tensor.name]
            hf.require_shape(f"{folder.path}: {tensor.meta_name}", joined.shape, tensor.shape, PARAMS)
        self.dtypes = {name: joined.dtype for name, joined in self._joined.items()}

    def read(self, tensor: param_mapping.Tensor, index: param_mapping.Index = (...,)) -> np.ndarray:
        """See `pipeline.Reader`. For q and k, `index` must select complete heads."""
        full = tuple(slice(None) for _ in tensor.shape)
        array = self._joined[tensor.name].read(full if index[0] is ... else index)
        return halves(array, self._config.head_dim) if tensor.spec.meta_pairs else array


def halves(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Reorders the rows of q or k from Meta's order (adjacent pairs) to Hugging Face's (first halves, then second)."""
    return rows.reshape(-1, head_dim // 2, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


def pairs(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """The inverse of `halves`."""
    return rows.reshape(-1, 2, head_dim // 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


def params_dict(config: ModelConfig) -> dict[str, Any]:
    """Returns the content of `params.json`. It has only Meta's keys, because Meta's code rejects others."""
    width = config.intermediate_size
    for multiple_of, multiplier in _FEED_FORWARD:
        if feed_forward(config.hidden_size, multiple_of, multiplier) == width:
            break
    else:  # these values express any width
        multiple_of, multiplier = 1, (width + 0.5) / int(8 * config.hidden_size / 3)
    params: dict[str, Any] = {"dim": config.hidden_size}
    if multiplier is not None:
        params["ffn_dim_multiplier"] = multiplier
    params |= {"multiple_of": multiple_of, "n_heads": config.num_attention_heads}
    if config.num_key_value_heads != config.num_attention_heads or config.vocab_size > _LLAMA3_VOCABULARY:
        params["n_kv_heads"] = config.num_key_value_heads
    params |= {"n_layers": config.num_hidden_layers, "norm_eps": config.rms_norm_eps, "vocab_size": config.vocab_size}
    if config.rope.theta != 10000.0:
        params["rope_theta"] = config.rope.theta
    if config.rope.kind == "llama3":
        params["use_scaled_rope"] = True
    return params


class Writer:
    """Writes all files of a Meta folder in parallel."""

    def __init__(
        self,
        folder: pathlib.Path,
        config: ModelConfig,
        order: list[param_mapping.Tensor],
        dtypes: pipeline.Dtypes,
        options: MetaOptions,
    ):
        """Checks that Meta's format can express the model, and creates the files.

        Raises:
          InputError: if it cannot; the message names the field.
        """
        count = options.files
        if config.head_dim * config.num_attention_heads != config.hidden_size:
            raise InputError(
                f"head_dim is {config.head_dim}: in Meta's format it must be hidden_size / num_attention_heads, "
                f"{config.hidden_size} / {config.num_attention_heads}"
            )
        sizes = {
            "num_key_value_heads": config.num_key_value_heads,
            "intermediate_size": config.intermediate_size,
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
        }
        for name, size in sizes.items():
            if size % count:
                raise InputError(f"meta.files is {count}: it must divide {name}, {size}")
        rows = options.embedding == "rows" or (options.embedding == "auto" and config.vocab_size > _LLAMA3_VOCABULARY)
        self._config, self._count = config, count
        self._embedding_split = 0 if rows else 1
        contents: dict[str, tuple[str, tuple[int, ...]]] = {}
        for tensor in order:
            for name, split in self._parts(tensor):
                shape = tuple(n // count if i == split else n for i, n in enumerate(tensor.shape))
                contents[name] = (dtypes[tensor.name].name, shape)
        self._files = [pth.Writer(folder / f"consolidated.{i:02d}.pth", contents) for i in range(count)]

    def _parts(self, tensor: param_mapping.Tensor) -> list[tuple[str, int | None]]:
        """Names under which to write a tensor, and the split dimension. A tied embedding is also written as head."""
        if tensor.spec.name != "embedding":
            return [(tensor.meta_name, tensor.spec.meta_split)]
        head = [("output.weight", 0)] if self._config.tie_word_embeddings else []
        return [(tensor.meta_name, self._embedding_split), *head]

    def write(self, tensor: param_mapping.Tensor, array: np.ndarray) -> None:
        """Writes the next tensor."""
        if tensor.spec.meta_pairs:
            array = pairs(array, self._config.head_dim)
        for name, split in self._parts(tensor):
            for number, file in enumerate(self._files):
                size = array.shape[split] // self._count if split is not None else 0
                here = slice(number * size, (number + 1) * size)
                piece = array if split is None else array[here] if split == 0 else array[:, here]
                file.write(name, piece)

    def close(self) -> None:
        """Completes and closes the files."""
        for file in self._files:
            file.close()

    def discard(self) -> None:
        """Closes the files without completing them."""
        for file in self._files:
            file.discard()


def write(
    reader: pipeline.Reader,
    config: ModelConfig,
    folder: epath.Path,
    options: MetaOptions,
    extras: str,
    verify: bool = True,
    quiet: bool = False,
) -> None:
    """Writes a model into an empty folder and, if `verify` is true, reads it back and compares it; see `hf.write`."""
    dtypes = reader.dtypes
    writer = Writer(pathlib.Path(folder), config, reader.order, dtypes, options)
    digests = pipeline.copy(reader, writer, verify, quiet)
    write_json(folder / PARAMS, params_dict(config))
    write_json(folder / SIDECAR, hf.config_dict(config, pipeline.main_dtype(dtypes)))
    copy_files(extras, folder, config.max_position_embeddings)
    if verify:
        hf.require_same(str(folder), Folder(str(folder)).config(), config)
        pipeline.verify(str(folder), digests, reader.order, dtypes, readback.meta(folder, config), quiet)
