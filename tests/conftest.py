"""Eight virtual CPU devices for the whole suite: set before JAX is imported."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import pytest

from pi_jax import sharding, testing
from pi_jax.config import MeshConfig


@pytest.fixture(scope="session")
def mesh():
    """A mesh of one device."""
    return sharding.make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """Paths of the tiny tokenizer, token store and held-out text."""
    return testing.tiny_inputs(tmp_path_factory.mktemp("inputs"))
