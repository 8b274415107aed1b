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
from pi_jax.config import MeshConfig
from pi_jax.parallel import sharding


@pytest.fixture(scope="session")
def mesh():
    """A mesh of one device."""
    return sharding.make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """Paths of the tiny tokenizer, token store and held-out text."""
    return tiny.tiny_inputs(tmp_path_factory.mktemp("inputs"))


def pytest_unconfigure():
    """Removes the compiled programs."""
    shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
