"""The whole schema of an experiment: frozen dataclasses, checked when they are built.

An experiment is a Python file with `get_config() -> Config` (see `configs/`). Every field can be overridden on the
command line, `--optimizer.learning-rate 1e-5`; a misspelt one is an error with a hint. Architecture fields carry the
names of Hugging Face's `LlamaConfig`.
"""

import dataclasses
import re
from typing import Annotated, Literal

import tyro

from pi_jax import limits
from pi_jax.config.validation import require, require_positive, require_types
from pi_jax.rope import Default, Scaling, build_scaling

BUILTIN = "builtin:tiny"
"""As `train.init_from`, in `data.sources` or `evaluate.data`: the tiny model and text of `pi_jax.tiny`, made on the
spot."""

_MOST_POSITIONS = 2**31 - 1  # they are int32

DType = Literal["float32", "bfloat16"]


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
        require_types("model", self)
        sizes = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
        sizes += "num_key_value_heads head_dim max_position_embeddings rms_norm_eps"
        require_positive("model", self, *sizes.split())
        if self.original_max_position_embeddings is not None:
            require_positive("model", self, "original_max_position_embeddings")
        limits.require("model.num_hidden_layers asks for", self.num_hidden_layers, limits.LAYERS, "layers")
        window = self.max_position_embeddings
        require(
            window <= _MOST_POSITIONS,
            f"model.max_position_embeddings is {window!r:.80}: it must be at most {_MOST_POSITIONS}",
        )
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        require(
            heads % kv_heads == 0,
            f"model.num_key_value_heads is {kv_heads}: it must divide num_attention_heads, {heads}",
        )
        require(self.head_dim % 2 == 0, f"model.head_dim is {self.head_dim}: rotary embedding needs an even size")
        inside = getattr(self.rope, "original_max_position_embeddings", None)
        if inside and inside < self.max_position_embeddings:
            require(
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
        require_types("rope", self)
        build_scaling(self.kind, 10000.0, self.factor)


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """How the model is computed; changes speed, memory and rounding, never its meaning."""

    dtype: DType = "bfloat16"
    """Dtype of activations and matrix products. Norms, softmax, RoPE and loss are always float32."""
    param_dtype: DType = "float32"
    """Dtype of the master weights. bfloat16 halves their memory and loses small updates."""
    remat: Literal["none", "layer", "attention", "offload"] = "layer"
    """What is kept for the backward pass: everything; a layer's input; that and what attention gives, so that it is not
    computed twice (not with cuDNN); or a layer's input in the host's memory (docs/parallelism.md)."""
    gradient_accumulation_steps: int = 1
    """Microbatches per step. Gradients are accumulated over them; raise it if a step runs out of memory."""
    attention: Literal["auto", "reference", "chunked", "pallas_triton", "splash", "cudnn"] = "auto"
    """Attention backend (docs/attention.md). "auto" selects the fastest that supports this device and packing."""
    loss_chunk: int = 1024
    """Tokens per chunk of the loss: logits exist for one chunk at a time. Lower it if the loss runs out of memory."""

    def __post_init__(self):
        require_types("compute", self)
        require_positive("compute", self, "loss_chunk", "gradient_accumulation_steps")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is read, and how documents become sequences."""

    sources: tuple[str, ...] = ()
    """Token stores made by `pi_jax.prepare`; 'STORE@2.5' gives one a weight in the mixture."""
    window: int = 2048
    """Sequence length in tokens: the extended window."""
    batch_size: int = 64
    """Sequences per step, over all devices."""
    packing: Literal["joined", "document"] = "joined"
    """'joined' concatenates documents and cuts every `window` tokens; 'document' never puts two in one sequence."""
    segment_masking: bool = False
    """Mask attention between the documents of a sequence."""
    reset_positions: bool = False
    """Count RoPE positions from 0 in each document. With short documents no long distance is ever trained."""
    mask_prompts: bool = False
    """Give weight 0 to the prompt of each document (`prepare --prompt-field`): the loss is on what follows it only."""
    pose_window: int = 0
    """Train for a window of this many tokens on sequences of only `window` (PoSE): a jump at a random place of each
    sequence lets its positions reach that far. 0: off."""
    require_long_documents: bool = True
    """Refuse a source in which no document fills the window: nothing would train the long distances."""
    seed: int = 0
    """Seed of the order of sequences."""
    prefetch: int = 8
    """Batches to prepare in advance."""

    def __post_init__(self):
        require_types("data", self)
        require_positive("data", self, "window", "batch_size")
        require(self.prefetch >= 0, f"data.prefetch is {self.prefetch}: it must be 0 or more")
        if self.pose_window:
            require(
                self.pose_window > self.window > 1,
                f"data.pose_window is {self.pose_window}: it must be longer than data.window, {self.window}",
            )
            require(not self.reset_positions, "data.pose_window is set: it needs data.reset_positions off")

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
    """Learning rate at step 0, as a fraction of `learning_rate`."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Schedule after warm-up; linear and cosine decay to 0 on the last step (ours)."""
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    """Ours."""
    weight_decay: float = 0.0
    """Never applied to norms."""
    max_grad_norm: float = 1.0
    """Global gradient norm (ours); 0 turns clipping off."""
    moment_dtype: DType = "float32"
    """Dtype in which the two moments are stored; they are always computed in float32. bfloat16 halves their memory."""
    offload: bool = False
    """Keep the moments in host memory. Use it if the model does not fit otherwise; each step waits for the transfer."""

    def __post_init__(self):
        require_types("optimizer", self)
        require_positive("optimizer", self, "learning_rate", "eps")
        for name in ("warmup_steps", "weight_decay", "max_grad_norm"):
            value = getattr(self, name)
            require(value >= 0, f"optimizer.{name} is {value}: it must be 0 or more")
        for name in ("warmup_start", "b1", "b2"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"optimizer.{name} is {value}: it must lie between 0 and 1")


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
        require_types("mesh", self)
        sizes = dataclasses.astuple(self)
        require(all(s == -1 or s > 0 for s in sizes), f"mesh is {self}: sizes must be positive, or -1")
        require(sizes.count(-1) <= 1, f"mesh is {self}: only one size can be -1")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The training run."""

    init_from: str = ""
    """Folder with the base model, Hugging Face's, Meta's or of another run; empty: random weights of the sizes in
    `model`."""
    output: str = "runs/pi_jax"
    """Folder of the run. If it already holds checkpoints, the run resumes from the latest."""
    steps: int = 1000
    seed: int = 0
    """Seed of the random weights, where there is no base model."""
    max_skipped_steps: int = 5
    """Steps in a row whose loss or gradient is not finite that end the run. Until then they are skipped."""
    stall_timeout: float = 0.0
    """Seconds without a finished step after which the run counts as stuck and ends with status 70; 0: 20 times the
    longest step so far, at least 300."""
    startup_timeout: float = 3600.0
    """The same for the time until the first step is finished, and for evaluations, exports and saves."""

    def __post_init__(self):
        require_types("train", self)
        require_positive("train", self, "steps", "max_skipped_steps", "startup_timeout")
        require(self.stall_timeout >= 0, f"train.stall_timeout is {self.stall_timeout}: it must be 0 or more")
        require(bool(self.output), "train.output is empty: it must name a folder")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints, written in the background; the last step is always saved."""

    folder: str = ""
    """Folder that holds `checkpoints/`: an absolute path or a `gs://` URL; empty: OUTPUT."""
    every: int = 100
    """Steps between checkpoints."""
    keep: int = 2
    """Newest ones that stay."""
    export_hf_every: int = 0
    """Steps between exports of the weights as `OUTPUT/hf/step-N`, a Hugging Face folder; 0: none."""
    export_dtype: DType = "bfloat16"
    """Dtype of the exported weights."""

    def __post_init__(self):
        require_types("checkpoint", self)
        require_positive("checkpoint", self, "every", "keep")
        require(
            self.folder.startswith(("/", "gs://")) or not self.folder,
            f"checkpoint.folder is {self.folder}: it must be an absolute path or a gs:// URL",
        )
        every = self.export_hf_every
        require(every >= 0, f"checkpoint.export_hf_every is {every}: it must be 0 or more")


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
        require_types("evaluate", self)
        require_positive("evaluate", self, "stride", "passkey_distances", "passkey_trials")
        require(self.every >= 0, f"evaluate.every is {self.every}: it must be 0 or more")
        something = self.data or self.passkey_lengths
        require(not self.every or something, "evaluate.every is set: it needs evaluate.data or passkey_lengths")
        for length in self.passkey_lengths:
            require(length > 0, f"evaluate.passkey_lengths has {length}: a window must be a positive number of tokens")
        if self.max_tokens is not None:
            require(self.max_tokens >= 2, f"evaluate.max_tokens is {self.max_tokens}: it must be at least 2")
        for window in self.windows:
            require(window >= 2, f"evaluate.windows has {window}: a window needs at least 2 tokens")


@dataclasses.dataclass(frozen=True)
class LoggingConfig:
    """Console and JSONL always; the rest by choice."""

    every: int = 10
    """Steps between log lines; logged values are means over these steps."""
    tensorboard: bool = True
    wandb_project: str = ""
    """Also log to this Weights & Biases project (needs `pip install wandb`)."""
    peak_tflops: float = 0.0
    """Peak TFLOP/s of one device, for MFU. 0 looks it up; set it for a device that pi_jax does not know."""

    def __post_init__(self):
        require_types("logging", self)
        require_positive("logging", self, "every")


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """A trace of some steps by `jax.profiler`, for TensorBoard or Perfetto."""

    steps: str = ""
    """Steps to trace, FIRST:LAST, such as '10:13' for the steps 10 to 13, into `OUTPUT/profile`; empty: no trace.
    Leave out the first step, which compiles."""

    def __post_init__(self):
        require_types("profile", self)
        first, last = self.bounds
        message = f"profile.steps is {self.steps!r}: it must be FIRST:LAST with 1 <= FIRST <= LAST, such as 10:13"
        require(not self.steps or 1 <= first <= last, message)

    @property
    def bounds(self) -> tuple[int, int]:
        """First and last step of the trace; (0, 0) without one."""
        match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", self.steps)
        return (int(match[1]), int(match[2])) if match else (0, 0)


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
    profile: ProfileConfig = ProfileConfig()
