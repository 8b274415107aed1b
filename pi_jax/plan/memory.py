"""Plans the memory of a train step by compiling it for hardware that is not present.

XLA's own compiler for the GPU or TPU lays out the memory of one device and reports its size. Nothing is executed and no
device is needed (`pi_jax.plan.topology`). Parameters, moments and gradients are computed from their shapes and
shardings; the total is the compiler's. The command is `python -m pi_jax.plan --config FILE`.
"""

import dataclasses
import functools
import math
import re
import time
from typing import Any

import jax
import jax.numpy as jnp

from pi_jax import log
from pi_jax.config import Config, MeshConfig, ModelConfig
from pi_jax.model import Llama, loss
from pi_jax.model.attention import attention, sharded
from pi_jax.parallel import chips, sharding
from pi_jax.parallel.chips import GIB
from pi_jax.plan import hlo
from pi_jax.plan.topology import Topology
from pi_jax.train import abstract, metrics, step
from pi_jax.train.optimizer import make_optimizer

MARGIN = 0.92
"""Fraction of a device's memory that a step may use; the runtime, NCCL and fragmentation need the rest. By default, JAX
uses only 75 % of a GPU's memory: set XLA_PYTHON_CLIENT_MEM_FRACTION=.92 to use this fraction."""
MFU = (0.3, 0.5)
"""Range of model FLOPs utilization used to estimate the time of a step; an assumption, not a measurement."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Memory, FLOPs and collectives of one step."""

    topology: str
    mesh: dict[str, int]
    rows: int
    """Sequences per microbatch on a device. Devices that share the sequence or the heads compute the same ones."""
    gradient_accumulation_steps: int
    attention: str
    remat: str
    peak: int
    """Peak memory of a device in bytes, as reported by the compiler."""
    memory: int
    """Memory that a device has, in bytes."""
    parts: dict[str, int]
    """Bytes by part: 'parameters', 'moments', 'gradients', 'kept activations', and 'working memory' (the rest)."""
    alone: dict[str, int]
    """Bytes that the loss and one layer's attention need besides their inputs, forward and backward, each compiled
    separately."""
    host: int
    """Host memory per device in bytes, for offloaded arrays."""
    flops: float
    """Model FLOPs of a step on all devices; `pi_jax.train.metrics` contains the formula."""
    seconds: tuple[float, float]
    """Duration of a step in seconds, at the upper and the lower value of `MFU`."""
    collectives: dict[str, dict[str, int]] | None
    """Kind -> {'count', 'bytes'} of a step on one device; None if the step did not compile or its HLO text cannot be
    read."""
    compile_seconds: float

    @property
    def fits(self) -> bool:
        """Whether the peak is within `MARGIN` of the memory."""
        return self.peak <= MARGIN * self.memory


def plan(config: Config, model: ModelConfig, mesh: jax.sharding.Mesh, memory: int, name: str = "") -> Plan:
    """Compiles the train step for a mesh, whose devices do not have to be present.

    Args:
      config: config of the experiment.
      model: extended architecture.
      mesh: mesh of the devices to compile for.
      memory: memory of one device in bytes.
      name: name of the topology.

    Raises:
      InputError: if sizes of the experiment are not divisible by those of the mesh.
    """
    abstract.check_sizes(config, model, mesh)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    gpu = mesh.devices.flat[0].platform != "tpu"
    with jax.set_mesh(mesh):
        weights = abstract.abstract_model(model, config.compute, mesh)
        state = abstract.abstract_state(weights, optimizer, mesh)
        batch = abstract.abstract_batch(config.data, mesh)
        before = time.monotonic()
        try:
            compiled = _compile(step.make_step(optimizer), (state, batch), gpu)
            stats, found = compiled.memory_analysis(), _collectives(compiled)
            peak, host = _peak(stats), stats.host_argument_size_in_bytes + stats.host_temp_size_in_bytes
        except _TooLargeError as error:
            peak, host, found = error.needed, 0, None
        seconds = time.monotonic() - before
        alone = {
            "loss": _besides_inputs(*_loss_alone(config, model, mesh, weights), gpu),
            "attention": _besides_inputs(*_attention_alone(config, model, mesh), gpu),
        }
    parts = {
        "parameters": _bytes(state.model),
        "moments": 0 if config.optimizer.offload else _bytes(state.opt_state),
        "gradients": _bytes(state.model),
        "kept activations": _kept(config, model, mesh),
    }
    parts["working memory"] = max(0, peak - sum(parts.values()))
    flops = config.data.batch_size * config.data.window * metrics.flops_per_token(model, config.data.window)
    kind = mesh.devices.flat[0].device_kind
    peak_flops = (chips.peak_tflops(kind) or math.nan) * 1e12 * mesh.size
    return Plan(
        topology=name,
        mesh=dict(mesh.shape),
        rows=_rows(config, mesh),
        gradient_accumulation_steps=config.compute.gradient_accumulation_steps,
        attention=config.compute.attention,
        remat=config.compute.remat,
        peak=peak,
        memory=memory,
        parts=parts,
        alone=alone,
        host=host,
        flops=flops,
        seconds=(flops / peak_flops / MFU[1], flops / peak_flops / MFU[0]),
        collectives=found,
        compile_seconds=seconds,
    )


class _TooLargeError(Exception):
    """The compiler stopped because a program needs more than the memory of a device, as that for TPUs does."""

    def __init__(self, needed: int):
        super().__init__(f"{needed} bytes needed")
        self.needed = needed
        """Bytes that the program needs, with its inputs."""


def _compile(function, arguments, gpu: bool):
    platform = jax.tree.leaves(arguments)[0].sharding.mesh.devices.flat[0].platform
    platform = "cuda" if platform == "gpu" else platform
    # Disable autotuning, which needs the device. The tiles that it would select may need other scratch memory.
    options = {"xla_gpu_autotune_level": 0} if platform == "cuda" else None
    # A step is already jitted and donates its state; wrapping it in another jit would lose the donation.
    jitted = function if hasattr(function, "trace") else jax.jit(function)
    lowered = jitted.trace(*arguments).lower(lowering_platforms=(platform,))
    try:
        return lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        needed = re.search(r"RESOURCE_EXHAUSTED.*\(([\d.]+)([KMGT])\) exceeds available HBM", str(error))
        if not needed:
            raise
        raise _TooLargeError(int(float(needed[1]) * 1024 ** (1 + "KMGT".index(needed[2])))) from None


def _collectives(compiled) -> dict[str, dict[str, int]] | None:
    try:
        return hlo.collectives(compiled.as_text())
    except jax.errors.JaxRuntimeError:  # jaxlib cannot read the output of a newer libtpu
        return None


def _peak(stats) -> int:
    held = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    return held + stats.temp_size_in_bytes


def _besides_inputs(function, arguments, gpu: bool) -> int:
    try:
        stats = _compile(function, arguments, gpu).memory_analysis()
    except _TooLargeError as error:
        return error.needed
    return stats.temp_size_in_bytes + stats.output_size_in_bytes


def _bytes(tree) -> int:
    """Bytes of the arrays of a pytree on one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _rows(config: Config, mesh) -> int:
    return config.data.batch_size // sharding.batch_shards(mesh) // config.compute.gradient_accumulation_steps


def _kept(config: Config, model: ModelConfig, mesh) -> int:
    """Bytes that all layers keep for the backward pass; 0 if that is unknown in advance or in host memory."""
    tokens = _rows(config, mesh) * config.data.window // mesh.shape["context"]
    heads = model.num_attention_heads // mesh.shape["tensor"]
    width = jnp.dtype(config.compute.dtype).itemsize
    layer = {
        "layer": model.hidden_size * width,
        "attention": model.hidden_size * width + heads * (model.head_dim * width + 4),
    }.get(config.compute.remat, 0)
    return model.num_hidden_layers * tokens * layer


def _loss_alone(config: Config, model: ModelConfig, mesh, weights: Llama):
    rows = config.data.batch_size // config.compute.gradient_accumulation_steps
    place = sharding.named(mesh, ("batch", "sequence", None))
    shape = (rows, config.data.window, model.hidden_size)
    hidden = jax.ShapeDtypeStruct(shape, config.compute.dtype, sharding=place)
    part = dataclasses.replace(config.data, batch_size=rows)
    batch = abstract.abstract_batch(part, mesh)

    table = weights.embedding if model.tie_word_embeddings else weights.head

    def value(hidden_BSD, table, batch):
        table_VD = sharding.gather(table[...].astype(config.compute.dtype), table.axes)
        return loss.weighted_loss(
            hidden_BSD, table_VD, batch["targets"], batch["loss_weights"], config.compute.loss_chunk
        )

    return jax.value_and_grad(value, argnums=(0, 1)), (hidden, table, batch)


def _attention_alone(config: Config, model: ModelConfig, mesh):
    rows = config.data.batch_size // config.compute.gradient_accumulation_steps

    def heads(name, number):
        place = sharding.named(mesh, ("batch", "sequence", name, None))
        shape = (rows, config.data.window, number, model.head_dim)
        return jax.ShapeDtypeStruct(shape, config.compute.dtype, sharding=place)

    q, k = heads("heads", model.num_attention_heads), heads("kv_heads", model.num_key_value_heads)
    segments = abstract.abstract_batch(dataclasses.replace(config.data, batch_size=rows), mesh).get("segment_ids")
    backend = functools.partial(attention, implementation=config.compute.attention)

    def value(q, k, v, segments):
        return jnp.sum(sharded.attend(backend, q, k, v, segments, zigzag=True).astype(jnp.float32))

    return jax.grad(value, argnums=(0, 1, 2)), (q, k, k, segments)


def search(config: Config, model: ModelConfig, largest: Topology) -> list[Plan]:
    """Finds the smallest number of devices that fits one sequence at a time, and then the most sequences at a time.

    It uses FSDP over as many devices as the batch allows and splits the sequence over the rest.

    Returns:
      All plans that were tried. The last one that fits is the result.
    """
    tried = []
    counts = [n for n in (2**i for i in range(20)) if n <= largest.count and (largest.chip.gpu or n != 2)]
    for count in counts:
        rows = 1
        while (attempt := _attempt(config, model, dataclasses.replace(largest, count=count), rows)) is not None:
            tried.append(attempt)
            log.info(_line(attempt))
            if not attempt.fits:
                break
            rows *= 2
        if any(p.fits for p in tried):
            break
    return tried


def _attempt(config: Config, model: ModelConfig, cluster: Topology, rows: int) -> Plan | None:
    fsdp = math.gcd(cluster.count, config.data.batch_size)
    if config.data.batch_size % (fsdp * rows):
        return None
    mesh = MeshConfig(data=1, fsdp=fsdp, context=cluster.count // fsdp, tensor=1)
    compute = dataclasses.replace(config.compute, gradient_accumulation_steps=config.data.batch_size // (fsdp * rows))
    config = dataclasses.replace(config, mesh=mesh, compute=compute)
    return plan(config, model, sharding.make_mesh(mesh, cluster.devices()), cluster.chip.memory, str(cluster))


def _line(p: Plan) -> str:
    mesh = ", ".join(f"{k} {v}" for k, v in p.mesh.items() if v > 1) or "one device"
    verdict = "fits" if p.fits else "does not fit"
    microbatches = f"{p.rows} sequences x {p.gradient_accumulation_steps}"
    return f"{p.topology} ({mesh}), {microbatches}: {p.peak / GIB:.1f} GiB, {verdict}"


def report(p: Plan, config: Config, model: ModelConfig) -> str:
    """Formats a plan as text."""
    largest = max(p.parts, key=p.parts.get)
    tokens = config.data.batch_size * config.data.window
    lines = [
        f"{p.topology}: {math.prod(p.mesh.values())} devices with {p.memory / GIB:.1f} GiB each, mesh {p.mesh}",
        f"{model.num_parameters() / 1e9:.2f} B parameters, {config.data.batch_size} sequences of {config.data.window} "
        f"tokens per step; microbatches per device: {p.gradient_accumulation_steps} of {p.rows} sequences",
        f"attention {p.attention}, remat {p.remat}; compiled in {p.compile_seconds:.0f} s",
        "",
        "Memory of one device, GiB:",
        *(
            f"  {name:<18}{size / GIB:8.2f}" + ("  <- most" if name == largest else "")
            for name, size in p.parts.items()
        ),
        f"  {'peak':<18}{p.peak / GIB:8.2f}  of {p.memory / GIB:.1f}: "
        + ("fits" if p.fits else f"does NOT fit: {(p.peak - MARGIN * p.memory) / GIB:.1f} GiB too much")
        + f" (limit {MARGIN:.0%}, {MARGIN * p.memory / GIB:.1f})",
        f"  Compiled alone, the loss needs {p.alone['loss'] / GIB:.2f} and the attention of a layer "
        f"{p.alone['attention'] / GIB:.2f}.",
    ]
    if p.host:
        lines.append(f"  Offloaded: {p.host / GIB:.1f} GiB of host memory per device.")
    lines += [
        "",
        f"Model FLOPs of a step: {p.flops:.3e} = {tokens} tokens x (6 P + 6 L N H S)",
        f"At an assumed MFU of {MFU[0]:.0%} to {MFU[1]:.0%}: {p.seconds[1]:.1f} to {p.seconds[0]:.1f} s per step, "
        f"{p.seconds[1] * config.train.steps / 3600:.1f} to {p.seconds[0] * config.train.steps / 3600:.1f} h for "
        f"{config.train.steps} steps",
        "Collectives per step and device:" + ("" if p.collectives is not None else " not known"),
        *(f"  {k:<20}{v['count']:6}  {v['bytes'] / 1e9:8.1f} GB" for k, v in sorted((p.collectives or {}).items())),
    ]
    return "\n".join(lines)


def as_json(p: Plan) -> dict[str, Any]:
    """Returns all fields of a plan, and whether it fits, for JSON."""
    return dataclasses.asdict(p) | {"fits": p.fits, "limit": MARGIN}
