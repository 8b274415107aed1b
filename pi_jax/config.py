"""The whole schema of an experiment: frozen dataclasses, checked when they are built.

An experiment is a Python file with `get_config() -> Config` (see `configs/`). Every field can be overridden on the
command line, `--optimizer.learning-rate 1e-5`; a misspelt one is an error with a hint. Architecture fields carry the
names of Hugging Face's `LlamaConfig`.
"""

import dataclasses
import importlib.util
import pathlib
import time
import typing
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import tyro

from pi_jax.errors import InputError
from pi_jax.rope import Default, Scaling, build_scaling

BUILTIN = "builtin:tiny"
"""As `train.init_from`, in `data.sources` or `evaluate.data`: the tiny model and text of `pi_jax.testing`, made on the
spot."""

DType = Literal["float32", "bfloat16"]


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise InputError(message)


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return value in arguments
    if origin is Annotated:
        return _fits(value, arguments[0])
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(item, arguments[0]) for item in value)
    if arguments:  # a union
        return any(_fits(value, argument) for argument in arguments)
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, hint)


def _require_types(section: str, config: Any) -> None:
    """A config file is Python: nothing else would notice steps=2.5 before it is too late."""
    hints = typing.get_type_hints(type(config), include_extras=True)
    for name, hint in hints.items():
        value = getattr(config, name)
        wanted = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
        _require(_fits(value, hint), f"{section}.{name} is {value!r}: it must be of type {wanted}")


def _require_positive(section: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(value > 0, f"{section}.{name} is {value}: it must be positive")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Architecture of a LLaMA-family model: what its weights mean, whatever machine computes them."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    """Window in tokens that the weights were trained for."""
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    rope: Annotated[Scaling, tyro.conf.Suppress] = Default()
    """Scaling that the weights were trained with."""
    original_max_position_embeddings: int | None = None
    """Window before its extension; None: never extended."""
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None

    def __post_init__(self):
        _require_types("model", self)
        sizes = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
        sizes += "num_key_value_heads head_dim max_position_embeddings rms_norm_eps"
        _require_positive("model", self, *sizes.split())
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        _require(
            heads % kv_heads == 0,
            f"model.num_key_value_heads is {kv_heads}: it must divide num_attention_heads, {heads}",
        )
        _require(self.head_dim % 2 == 0, f"model.head_dim is {self.head_dim}: rotary embedding needs an even size")
        inside = getattr(self.rope, "original_max_position_embeddings", None)
        if inside and inside < self.max_position_embeddings:
            _require(
                self.original_max_position_embeddings == inside,
                f"model.original_max_position_embeddings is {self.original_max_position_embeddings}: it must be that "
                f"of its rope, {inside}",
            )

    @property
    def original_window(self) -> int:
        """Tokens of the window before any extension."""
        return self.original_max_position_embeddings or self.max_position_embeddings

    def num_parameters(self) -> int:
        """Trainable parameters; a tied embedding counts once."""
        attention = self.hidden_size * self.head_dim * 2 * (self.num_attention_heads + self.num_key_value_heads)
        layer = attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        tables = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.num_hidden_layers * layer + tables + self.hidden_size


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """The extension: how the RoPE of the base model is scaled for training, evaluation or export."""

    kind: str = "default"
    """'linear' is Position Interpolation; 'ntk', 'dynamic' and 'yarn' are the alternatives (docs/rope.md); 'default'
    leaves the base model's RoPE as it is."""
    factor: float = 1.0
    """New window divided by the base model's window."""
    stacking: Literal["refuse", "compose", "replace"] = "refuse"
    """If the model is scaled already: stop; multiply the factors ('linear' on 'linear' only); or start again from the
    base model's window and theta, as if it had never been scaled."""

    def __post_init__(self):
        _require_types("rope", self)
        build_scaling(self.kind, 10000.0, self.factor)


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """How the model is computed; changes speed, memory and rounding, never its meaning."""

    dtype: DType = "bfloat16"
    """Of activations and matrix products. Norms, softmax, RoPE and loss are float32 always."""
    param_dtype: DType = "float32"
    """Of the master weights."""
    remat: Literal["none", "layer", "attention", "offload"] = "layer"
    """What is kept for the backward pass: everything; a layer's input; that and what attention gives, so that it is not
    computed twice (not with cuDNN); or a layer's input in the host's memory (docs/parallelism.md)."""
    accumulation: int = 1
    """Parts in which the rows of a batch are computed, one after the other; the gradient is that of the whole."""
    attention: Literal["auto", "reference", "chunked", "pallas_triton", "splash", "cudnn"] = "auto"
    """Backend: see docs/attention.md; "auto" takes the best that this device and the packing allow."""
    loss_chunk: int = 1024
    """Tokens whose logits exist at one time."""

    def __post_init__(self):
        _require_types("compute", self)
        _require_positive("compute", self, "loss_chunk", "accumulation")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is read, and how documents become rows."""

    sources: tuple[str, ...] = ()
    """Token stores made by `pi_jax.prepare`; 'STORE@2.5' gives one a weight in the mixture."""
    window: int = 2048
    """Tokens in a row: the extended window."""
    batch_size: int = 64
    """Rows in a step, over all devices."""
    packing: Literal["joined", "document"] = "joined"
    """'joined': documents one after the other, cut every `window` tokens; 'document': no row holds two documents."""
    segment_masking: bool = False
    """Stop attention between the documents of a row."""
    reset_positions: bool = False
    """Count RoPE positions from 0 in each document. With short documents no long distance is ever trained."""
    mask_prompts: bool = False
    """Give weight 0 to the prompt of each document (`prepare --prompt-field`): the loss is on what follows it only."""
    pose_window: int = 0
    """Train for a window of this many tokens on rows of only `window` (PoSE): a jump at a random place of each row lets
    its positions reach that far. 0: off."""
    require_long_documents: bool = True
    """Refuse a source in which no document fills the window: nothing would train the long distances."""
    seed: int = 0
    """Of the order of rows."""
    prefetch: int = 8
    """Batches prepared ahead."""

    def __post_init__(self):
        _require_types("data", self)
        _require_positive("data", self, "window", "batch_size")
        _require(self.prefetch >= 0, f"data.prefetch is {self.prefetch}: it must be 0 or more")
        if self.pose_window:
            _require(
                self.pose_window > self.window > 1,
                f"data.pose_window is {self.pose_window}: it must be longer than data.window, {self.window}",
            )
            _require(not self.reset_positions, "data.pose_window is set: it needs data.reset_positions off")

    @property
    def reach(self) -> int:
        """Tokens of the window that is trained for: one more than the largest position."""
        return max(self.window, self.pose_window)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW as in the paper (section 3.1); what the paper does not state is marked 'ours'."""

    learning_rate: float = 2e-5
    warmup_steps: int = 20
    warmup_start: float = 0.1
    """Fraction of the learning rate at step 0."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After warm-up; linear and cosine end at 0 on the last step (ours)."""
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    """Ours."""
    weight_decay: float = 0.0
    """Never applied to norms."""
    clip_norm: float = 1.0
    """Global gradient norm (ours); 0 turns clipping off."""
    moment_dtype: DType = "float32"
    """Of the two moments as they are stored; they are computed in float32."""
    offload: bool = False
    """Keep the moments in the host's memory, for models that would not fit otherwise; each step waits for them."""

    def __post_init__(self):
        _require_types("optimizer", self)
        _require_positive("optimizer", self, "learning_rate", "eps")
        for name in ("warmup_steps", "weight_decay", "clip_norm"):
            value = getattr(self, name)
            _require(value >= 0, f"optimizer.{name} is {value}: it must be 0 or more")
        for name in ("warmup_start", "b1", "b2"):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"optimizer.{name} is {value}: it must lie between 0 and 1")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; one size may be -1: whatever is left."""

    data: int = 1
    """Replicas of the parameters."""
    fsdp: int = -1
    """Shards of parameters, gradients and optimizer state; also splits the batch."""
    context: int = 1
    """Shards of the sequence."""
    tensor: int = 1
    """Shards of heads and feed-forward channels."""

    def __post_init__(self):
        _require_types("mesh", self)
        sizes = dataclasses.astuple(self)
        _require(all(s == -1 or s > 0 for s in sizes), f"mesh is {self}: sizes must be positive, or -1")
        _require(sizes.count(-1) <= 1, f"mesh is {self}: only one size can be -1")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The run."""

    init_from: str = ""
    """Folder with the base model, Hugging Face's, Meta's or of another run; empty: random weights of the sizes in
    `model`."""
    output: str = "runs/pi_jax"
    """Folder of the run. If it already holds checkpoints, the run goes on from the latest."""
    steps: int = 1000
    seed: int = 0
    """Of the random weights."""

    def __post_init__(self):
        _require_types("train", self)
        _require_positive("train", self, "steps")
        _require(bool(self.output), "train.output is empty: it must name a folder")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints under `OUTPUT/checkpoints`, written in the background; the last step is always saved."""

    every: int = 100
    """Steps between checkpoints."""
    keep: int = 2
    """Newest ones that stay."""
    export_hf_every: int = 0
    """Steps between exports of the weights as `OUTPUT/hf/step-N`, a Hugging Face folder; 0: none."""
    export_dtype: DType = "bfloat16"
    """Of the exported weights."""

    def __post_init__(self):
        _require_types("checkpoint", self)
        _require_positive("checkpoint", self, "every", "keep")
        every = self.export_hf_every
        _require(every >= 0, f"checkpoint.export_hf_every is {every}: it must be 0 or more")


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Perplexity on held-out text and passkey retrieval: after the last step, and during the run if asked for."""

    every: int = 0
    """Steps between evaluations, the first one before the first step; 0: only after the last step."""

    data: tuple[str, ...] = ()
    """Text files, folders or globs; without any there is no perplexity."""
    windows: tuple[int, ...] = ()
    """Window sizes in tokens; empty: the training window."""
    stride: int = 256
    """Tokens a window advances: each later token is scored with at least window - stride tokens before it."""
    max_tokens: int | None = None
    """Cut documents to this many tokens."""
    passkey_lengths: tuple[int, ...] = ()
    """Windows in tokens at which k_max is measured; empty: no passkey."""
    passkey_distances: int = 32
    """Distances of the key for each length."""
    passkey_trials: int = 10
    """Keys for each distance."""

    def __post_init__(self):
        _require_types("evaluate", self)
        _require_positive("evaluate", self, "stride", "passkey_distances", "passkey_trials")
        _require(self.every >= 0, f"evaluate.every is {self.every}: it must be 0 or more")
        something = self.data or self.passkey_lengths
        _require(not self.every or something, "evaluate.every is set: it needs evaluate.data or passkey_lengths")
        for length in self.passkey_lengths:
            _require(length > 0, f"evaluate.passkey_lengths has {length}: a window is a positive number of tokens")
        if self.max_tokens is not None:
            _require(self.max_tokens >= 2, f"evaluate.max_tokens is {self.max_tokens}: it must be at least 2")
        for window in self.windows:
            _require(window >= 2, f"evaluate.windows has {window}: a window needs at least 2 tokens")


@dataclasses.dataclass(frozen=True)
class LoggingConfig:
    """Console and JSONL always; the rest by choice."""

    every: int = 10
    """Steps between log lines; values are means over these steps."""
    tensorboard: bool = True
    wandb_project: str = ""
    """Also log to this Weights & Biases project (needs `pip install wandb`)."""
    peak_tflops: float = 0.0
    """Of one device, for MFU, where the device is not in the table of `pi_jax.metrics`."""

    def __post_init__(self):
        _require_types("logging", self)
        _require_positive("logging", self, "every")


@dataclasses.dataclass(frozen=True)
class Config:
    """One experiment."""

    model: ModelConfig | None = None
    """None: the architecture of `train.init_from`; given as well, the two must agree."""
    rope: RopeConfig = RopeConfig()
    compute: ComputeConfig = ComputeConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    logging: LoggingConfig = LoggingConfig()


def extend(model: ModelConfig, wanted: RopeConfig) -> ModelConfig:
    """The architecture with its RoPE scaled as `wanted` and its window grown by the factor.

    `RopeConfig()` (kind 'default') leaves the model alone, scaled or not. The same scaling once more is no change.

    Raises:
      InputError: if the model is already scaled in another way and `wanted.stacking` does not say what that means, or
        says what this model does not allow; factors are never multiplied silently.
    """
    if wanted.kind == "default":
        return model
    original, longest = model.original_window, model.max_position_embeddings
    scaling = build_scaling(wanted.kind, model.rope.theta, wanted.factor, window=original, head_dim=model.head_dim)
    if scaling == model.rope:
        return model
    recorded = model.original_max_position_embeddings is not None
    if model.rope.kind != "default" or recorded:
        if wanted.stacking == "refuse":
            raise InputError(
                f"the model is already scaled, {model.rope} with a window of {longest}, and rope asks for {scaling}: "
                "say by rope.stacking whether to 'compose' the two or to 'replace' the old one, or leave rope.kind at "
                "'default' to go on with the scaling it has"
            )
        if wanted.stacking == "compose":
            if model.rope.kind != "linear" or wanted.kind != "linear":
                raise InputError(
                    f"rope.stacking is 'compose', which multiplies the factors of 'linear' and 'linear', but the model "
                    f"has {model.rope} and rope asks for {scaling}"
                )
            return dataclasses.replace(
                model,
                rope=dataclasses.replace(model.rope, factor=model.rope.factor * wanted.factor),
                max_position_embeddings=int(longest * wanted.factor),
            )
        if model.rope.kind == "default" or not recorded:
            raise InputError(
                f"rope.stacking is 'replace', but the model, {model.rope} with a window of {longest}, does not record "
                "the theta or the window it had before: start from the unscaled model"
            )
    extended = int(original * wanted.factor)
    return dataclasses.replace(
        model,
        rope=scaling,
        max_position_embeddings=extended,
        original_max_position_embeddings=original if extended > original else None,
    )


def smoke(config: Config) -> Config:
    """The same experiment in miniature: every code path, a model and text that fit in seconds on a laptop.

    Kept: RoPE kind and factor, packing, masks, precision, schedule, mesh; where the config states an architecture, its
    theta, tying and grouping of heads; where it starts from a folder, so does this, from a tiny one. The base window
    becomes 64 tokens, the training window 64 times the factor. Each smoke run gets a folder of its own.
    """
    factor = config.rope.factor
    window = int(64 * factor)
    model = config.model
    if config.train.init_from:
        model = None
    elif model is not None:
        model = dataclasses.replace(
            model,
            vocab_size=260,
            hidden_size=64,
            intermediate_size=160,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2 if model.num_key_value_heads < model.num_attention_heads else 4,
            head_dim=16,
            max_position_embeddings=64,
            original_max_position_embeddings=None,
            rope=Default(model.rope.theta),
            bos_token_id=256,
            eos_token_id=257,
        )
    return dataclasses.replace(
        config,
        model=model,
        data=dataclasses.replace(
            config.data,
            sources=(BUILTIN,),
            window=64 if config.data.pose_window else window,
            pose_window=window if config.data.pose_window else 0,
            batch_size=8,
            prefetch=2,
        ),
        optimizer=dataclasses.replace(config.optimizer, learning_rate=3e-3, warmup_steps=2),
        train=dataclasses.replace(
            config.train,
            init_from=BUILTIN if config.train.init_from else "",
            output=config.train.output + time.strftime("-smoke-%H%M%S"),
            steps=8,
        ),
        checkpoint=dataclasses.replace(
            config.checkpoint, every=4, export_hf_every=4 if config.checkpoint.export_hf_every else 0
        ),
        evaluate=dataclasses.replace(
            config.evaluate,
            every=4 if config.evaluate.every else 0,
            data=(BUILTIN,),
            windows=tuple(sorted({64, window})),
            stride=32,
            max_tokens=4 * window,
            passkey_lengths=(512,) if config.evaluate.passkey_lengths else (),  # of bytes: the prompt alone has 400
            passkey_distances=2,
            passkey_trials=2,
        ),
        compute=dataclasses.replace(config.compute, loss_chunk=min(config.compute.loss_chunk, window // 2)),
        logging=dataclasses.replace(config.logging, every=2),
    )


def load_config(path: str) -> Config:
    """The config of an experiment file.

    Raises:
      InputError: if the file is missing, is not Python, has no `get_config`, or returns something else.
    """
    file = pathlib.Path(path)
    _require(file.is_file(), f"--config {path}: there is no such file")
    _require(file.suffix == ".py", f"--config {path}: an experiment is a Python file with get_config()")
    spec = importlib.util.spec_from_file_location(f"pi_jax_config_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except Exception as error:
        raise InputError(f"{path} cannot be used as a config: {type(error).__name__}: {error}") from error
    _require(isinstance(config, Config), f"{path}: get_config() returned {type(config).__name__}, not Config")
    return config


@dataclasses.dataclass(frozen=True)
class _File:
    """Fine-tune a LLaMA-family model with a longer window by Position Interpolation.

    Every field of the experiment file can be overridden: --optimizer.learning-rate 1e-5. `--config FILE --help` lists
    them with the file's values."""

    config: str
    """Experiment file, for example configs/tiny.py."""
    smoke: bool = False
    """Run the same experiment in miniature: tiny model and text, every code path."""


def parse(argv: Sequence[str] | None = None, command: str = "train") -> tuple[Config, Config]:
    """The config as overridden by the command line, and the file's own, to show the difference.

    Exits with status 2 and a hint on an unknown or ill-typed field, as argparse does.
    """
    import sys

    argv = list(sys.argv[1:] if argv is None else argv)
    if not any(word.split("=")[0] == "--config" for word in argv):
        tyro.cli(_File, prog=f"python -m pi_jax.{command}", args=argv)  # prints the help or names what is missing
    wants_help = [word for word in argv if word in ("-h", "--help")]
    file, overrides = tyro.cli(
        _File,
        prog=f"python -m pi_jax.{command}",
        args=[word for word in argv if word not in wants_help],
        return_unknown_args=True,
    )
    base = load_config(file.config)
    if file.smoke:
        base = smoke(base)
    config = tyro.cli(
        Config,
        prog=f"python -m pi_jax.{command} --config {file.config}",
        default=base,
        args=overrides + wants_help,
        config=(tyro.conf.AvoidSubcommands,),
    )
    return config, base


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """{'optimizer.learning_rate': 2e-5, ...}: every field by its dotted name."""
    flat = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        name = prefix + field.name
        if dataclasses.is_dataclass(value) and not isinstance(value, Scaling):
            flat |= flatten(value, name + ".")
        else:
            flat[name] = value
    return flat


def describe(config: Config, base: Config) -> str:
    """The resolved config for people: what differs from `base` first, then everything."""
    now, before = flatten(config), flatten(base)
    changed = [f"  {k} = {v!r}  (was {before.get(k)!r})" for k, v in now.items() if before.get(k) != v]
    lines = ["Changed from the config file:", *changed] if changed else []
    return "\n".join([*lines, "Config:", *(f"  {k} = {v!r}" for k, v in now.items())])
