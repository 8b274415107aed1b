"""Eight virtual CPU devices for the whole suite, and programs compiled once: set before JAX is imported."""

import os
import shutil
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
# Many tests train the same small model, some in processes of their own. Gone at the end, so nothing old is ever run.
os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="pi_jax-programs-")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

import jax
import pytest

from pi_jax import tiny
from pi_jax.config import (
    CheckpointConfig,
    ComputeConfig,
    Config,
    DataConfig,
    LoggingConfig,
    MeshConfig,
    OptimizerConfig,
    RopeConfig,
    TrainConfig,
)
from pi_jax.parallel import sharding
from pi_jax.tiny import tiny_model_config


@pytest.fixture(scope="session")
def mesh():
    """A mesh of one device."""
    return sharding.make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """Paths of the tiny tokenizer, token store and held-out text."""
    return tiny.tiny_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def config(inputs, tmp_path):
    """A run of 6 steps on the tiny model; checkpoints every 2."""
    return Config(
        model=tiny_model_config(),
        rope=RopeConfig("linear", 2.0),
        compute=ComputeConfig(dtype="float32", loss_chunk=64),
        data=DataConfig(sources=(inputs["tokens"],), window=128, batch_size=8, prefetch=2),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=2),
        train=TrainConfig(output=str(tmp_path / "run"), steps=6),
        checkpoint=CheckpointConfig(every=2),
        logging=LoggingConfig(every=1, tensorboard=False),
    )


def pytest_unconfigure():
    """Removes the compiled programs."""
    shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
