"""AdamW with linear warm-up, as in the paper's section 3.1, from optax."""

import functools

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from pi_jax.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Returns the schedule: linear warm-up from `warmup_start` x the rate, then constant, linear or cosine decay to 0.

    The paper states the warm-up (20 steps from 10 %) and mentions no decay, so the default is constant.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    rest = max(steps - warmup, 1)
    after = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
    }[config.schedule]
    return optax.join_schedules([optax.linear_schedule(config.warmup_start * peak, peak, warmup), after], [warmup])


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformationExtraArgs:
    """Clipping by global norm, then AdamW; its moments have the structure and sharding of the parameters.

    `update` takes `finite` too: whether loss and gradients are. If not, the state stays as it was.
    """
    # Without clipping the state has the same structure, so that a resumed run may turn it on or off.
    clip = optax.clip_by_global_norm(config.max_grad_norm) if config.max_grad_norm else optax.identity()
    adamw = optax.adamw(
        learning_rate(config, steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=_decayed,
    )
    return optax.chain(clip, _stored(adamw, config.moment_dtype, config.offload))


def _stored(inner: optax.GradientTransformation, dtype: str, on_host: bool) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that its state is stored in `dtype`, optionally on the host, and used in float32.

    `finite` decides here, because on the host nothing is computed.
    """
    memory = jax.memory.Space.Host if on_host else jax.memory.Space.Device

    def store(x):
        if not x.ndim:
            return x  # the step count
        x = x.astype(dtype)
        return jax.device_put(x, memory) if on_host else x

    def load(x):
        if not x.ndim:
            return x
        x = jax.device_put(x, jax.memory.Space.Device) if on_host else x
        return x.astype(jnp.float32)

    def init(params):
        return jax.tree.map(store, inner.init(params))

    def update(gradients, state, params, *, finite):
        before = jax.tree.map(load, state)
        updates, after = inner.update(gradients, before, params)
        after = jax.tree.map(functools.partial(jnp.where, finite), after, before)
        return updates, jax.tree.map(store, after)

    return optax.GradientTransformationExtraArgs(init, update)


def _decayed(params):
    """Mask of weight decay: true for every parameter except norm scales."""
    return jax.tree.map(
        lambda param: param.replace(param.axes != ("norm",)),
        params,
        is_leaf=lambda x: isinstance(x, nnx.Param),
    )
