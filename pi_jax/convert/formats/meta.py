"""Meta's folders: `params.json` and one or more `consolidated.NN.pth`, as LLaMA 1, 2 and 3 came.

`params.json` does not say everything: not the window, not a RoPE scaling but Llama 3's, not whether the head is tied.
A folder written here has `hf_config.json` beside it, in Hugging Face's form, which says it all. For others:

- window: 2048 where each layer has `rope.freqs` (LLaMA 1), 4096 (LLaMA 2), 16384 where theta is above 10000 (Code
  Llama), 8192 with a vocabulary above 100,000 (Llama 3), 131072 with `use_scaled_rope` (Llama 3.1 and later);
- `use_scaled_rope`: 'llama3' with factor 8 from a window of 8192; 32 in models of at most 3072 channels (Llama 3.2);
- tied: where `output.weight` is absent or equal to `tok_embeddings.weight`.
"""

import dataclasses
import pathlib
from typing import Any, Literal

import numpy as np
from etils import epath

from pi_jax.config import ModelConfig
from pi_jax.convert import param_mapping, pipeline
from pi_jax.convert.folders import copy_files, is_remote, read_json, write_json
from pi_jax.convert.formats import hf, pth
from pi_jax.convert.verify import readback
from pi_jax.errors import InputError
from pi_jax.rope import Default, Llama3, Scaling

PARAMS = "params.json"
SIDECAR = "hf_config.json"
_LLAMA3_VOCABULARY = 100_000
_REQUIRED = ("dim", "n_layers", "n_heads", "norm_eps")
_KNOWN = (
    *_REQUIRED,
    *"n_kv_heads vocab_size multiple_of ffn_dim_multiplier hidden_dim head_dim rope_theta use_scaled_rope".split(),
    *"rope_scaling_factor max_seq_len max_batch_size sliding_window".split(),
)
# What Meta wrote beside the width; tried in this order, so that released sizes come out as they were.
_FEED_FORWARD = ((256, None), (256, 1.5), (4096, 1.3), (1024, 1.3), (4096, 1.2))


@dataclasses.dataclass(frozen=True)
class MetaOptions:
    """What a Meta folder does not say of itself, or can be written as."""

    window: int = 0
    """Window of a source, in tokens; 0 applies the rules of docs/convert.md."""
    files: int = 1
    """Number of consolidated.NN.pth files to write. LLaMA's own code expects one per device."""
    embedding: Literal["auto", "rows", "columns"] = "auto"
    """Split the embedding of a target by 'columns' (LLaMA 1, 2) or 'rows' (Llama 3); 'auto' goes by vocabulary."""

    def __post_init__(self):
        if self.files < 1 or self.window < 0:
            raise InputError(
                f"meta.files is {self.files} and meta.window {self.window}: they must be positive, or 0 for the window"
            )


def is_folder(folder: Any) -> bool:
    """Whether a folder has the files of Meta's form."""
    return (folder / PARAMS).is_file()


def feed_forward(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """Width of the feed-forward layer, as Meta's code computes it."""
    width = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        width = int(multiplier * width)
    return multiple_of * ((width + multiple_of - 1) // multiple_of)


class Folder:
    """A Meta folder: its parameters and the contents of its files."""

    def __init__(self, path: str):
        """Reads params.json and the files' tables of contents.

        Raises:
          InputError: if a file is missing, broken or not of one model with the others.
        """
        if is_remote(path):
            raise InputError(
                f"{path}: .pth files are read from a local folder only: copy it, or convert it where it is"
            )
        self.path = pathlib.Path(path)
        self.params = read_json(self.path / PARAMS)
        for key in _REQUIRED:
            if key not in self.params:
                raise InputError(f"{self.path / PARAMS}: {key} missing")
        for key, value in self.params.items():
            if (key not in _KNOWN and value) or (key == "sliding_window" and value):
                raise InputError(f"{self.path / PARAMS}: {key} is {value!r}, which is not supported")
        found = sorted(self.path.glob("consolidated.*.pth"))
        if [p.name for p in found] != [f"consolidated.{i:02d}.pth" for i in range(len(found))] or not found:
            names = ", ".join(p.name for p in found) or "none"
            raise InputError(f"{path} must hold consolidated.00.pth and so on without gaps, but holds {names}")
        self.files = [pth.File(p) for p in found]

    def names(self, file: pth.File) -> set[str]:
        """Names of the tensors in a file but for those that hold no weights."""
        return {name for name in file.entries if not name.endswith(param_mapping.META_IGNORED)}

    def joined(self, name: str, split: int | None) -> pth.Joined:
        """A tensor of all files; an embedding is split by rows where its parts are as wide as a norm."""
        if name == "tok_embeddings.weight":
            norm, part = (self.files[0].entries.get(n) for n in ("norm.weight", name))
            split = 0 if norm and part and norm.shape == part.shape[1:] else 1
        return pth.Joined(self.files, name, split)

    def config(self, window: int = 0) -> ModelConfig:
        """The architecture.

        Args:
          window: tokens that the weights were trained for; 0: see the module's docstring.

        Raises:
          InputError: naming the key whose value is missing, wrong or not supported.
        """
        path = self.path / PARAMS
        try:
            config = self._config(window)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        except (TypeError, ValueError, ZeroDivisionError) as error:
            raise InputError(f"{path} has a value of the wrong type: {error}") from None
        sidecar = self.path / SIDECAR
        if not sidecar.is_file():
            return config
        stated = hf.read_config(str(self.path), SIDECAR)
        for field in dataclasses.fields(ModelConfig):
            ours, theirs = getattr(config, field.name), getattr(stated, field.name)
            if field.name in _SHARED and ours != theirs:
                raise InputError(f"{sidecar}: {field.name} is {theirs}, but {PARAMS} says {ours}")
        if stated.rope.theta != config.rope.theta:
            raise InputError(f"{sidecar}: theta is {stated.rope.theta}, but {PARAMS} says {config.rope.theta}")
        return stated

    def _config(self, window: int) -> ModelConfig:
        params = self.params
        dim, heads = params["dim"], params["n_heads"]
        vocabulary = params.get("vocab_size", -1)
        if vocabulary == -1:  # LLaMA 1 leaves it to the tokenizer
            vocabulary = self._rows("output.weight" if self._has("output.weight") else "tok_embeddings.weight")
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
            raise InputError(f"vocab_size is not given, and consolidated.00.pth lacks {name}")
        rows = self.files[0].entries[name].shape[0]
        return rows * len(self.files) if name == "output.weight" else rows

    def _window(self, vocabulary: int, theta: float, scaled: bool) -> int:
        if scaled:
            return 131072
        if vocabulary > _LLAMA3_VOCABULARY:
            return 8192
        if theta > 10000:
            return 16384
        return (
            2048
            if any(name.endswith("attention.inner_attention.rope.freqs") for name in self.files[0].entries)
            else 4096
        )

    def _tied(self) -> bool:
        if not self._has("output.weight"):
            return True
        table = self.joined("tok_embeddings.weight", 1)
        head = self.joined("output.weight", 0)
        if table.shape != head.shape or table.dtype != head.dtype:
            return False
        for start in range(0, table.shape[0], 1024):  # different tables differ in the first rows already
            rows = (slice(start, min(start + 1024, table.shape[0])), slice(None))
            if table.read(rows).tobytes() != head.read(rows).tobytes():
                return False
        return True


_SHARED = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "rms_norm_eps tie_word_embeddings"
).split()


class Reader:
    """The tensors of a Meta folder, joined and in Hugging Face's order, read lazily."""

    def __init__(self, folder: Folder, config: ModelConfig):
        """Checks names, shapes and dtypes.

        Raises:
          InputError: for a missing, unexpected or wrongly shaped tensor.
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
        """See `stream.Reader`; of q and k whole heads only."""
        full = tuple(slice(None) for _ in tensor.shape)
        array = self._joined[tensor.name].read(full if index[0] is ... else index)
        return halves(array, self._config.head_dim) if tensor.spec.meta_pairs else array


def halves(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of q or k from Meta's order, pairs side by side, to Hugging Face's, all firsts before all seconds."""
    return rows.reshape(-1, head_dim // 2, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


def pairs(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """The inverse of `halves`."""
    return rows.reshape(-1, 2, head_dim // 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


def params_dict(config: ModelConfig) -> dict[str, Any]:
    """`params.json`, with Meta's keys only: its code refuses others."""
    width = config.intermediate_size
    for multiple_of, multiplier in _FEED_FORWARD:
        if feed_forward(config.hidden_size, multiple_of, multiplier) == width:
            break
    else:  # any width can be said
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
    """The files of a Meta folder, all written side by side."""

    def __init__(
        self,
        folder: pathlib.Path,
        config: ModelConfig,
        order: list[param_mapping.Tensor],
        dtypes: pipeline.Dtypes,
        options: MetaOptions,
    ):
        """Checks that the model can be said in Meta's form and starts the files.

        Raises:
          InputError: naming the field that Meta's form cannot express.
        """
        count = options.files
        if config.head_dim * config.num_attention_heads != config.hidden_size:
            raise InputError(
                f"head_dim is {config.head_dim}: in Meta's form it can only be hidden_size / num_attention_heads, "
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
                raise InputError(
                    f"{name} is {size}, which does not divide over {count} files: choose another meta.files"
                )
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
        """Names under which a tensor is written, and the dimension split; a tied embedding is Meta's head as well."""
        if tensor.spec.name != "embedding":
            return [(tensor.meta_name, tensor.spec.meta_split)]
        head = [("output.weight", 0)] if self._config.tie_word_embeddings else []
        return [(tensor.meta_name, self._embedding_split), *head]

    def write(self, tensor: param_mapping.Tensor, array: np.ndarray) -> None:
        """Takes the next tensor."""
        if tensor.spec.meta_pairs:
            array = pairs(array, self._config.head_dim)
        for name, split in self._parts(tensor):
            for number, file in enumerate(self._files):
                size = array.shape[split] // self._count if split is not None else 0
                here = slice(number * size, (number + 1) * size)
                piece = array if split is None else array[here] if split == 0 else array[:, here]
                file.write(name, piece)

    def close(self) -> None:
        """Finishes the files."""
        for file in self._files:
            file.close()

    def discard(self) -> None:
        """Closes the files, unfinished."""
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
    """Fills an empty folder from a reader and, with `verify`, compares what then lies there; see `hf.write`."""
    dtypes = reader.dtypes
    writer = Writer(pathlib.Path(folder), config, reader.order, dtypes, options)
    digests = pipeline.copy(reader, writer, verify, quiet)
    write_json(folder / PARAMS, params_dict(config))
    write_json(folder / SIDECAR, hf.config_dict(config, pipeline.main_dtype(dtypes)))
    copy_files(extras, folder, config.max_position_embeddings)
    if verify:
        hf.require_same(str(folder), Folder(str(folder)).config(), config)
        pipeline.verify(str(folder), digests, reader.order, dtypes, readback.meta(folder, config), quiet)
