"""Checks that the dependencies are installed before a command imports them: outside the environment, none is."""

import importlib.util
import sys

MODULES = (
    "jax",
    "flax",
    "optax",
    "orbax",
    "tensorstore",
    "grain",
    "transformers",
    "safetensors",
    "etils",
    "ml_dtypes",
    "numpy",
    "tyro",
    "jaxtyping",
    "pyarrow",
    "tqdm",
    "xxhash",
    "tensorboardX",
)
"""What the dependencies in pyproject.toml are imported as."""


def require() -> None:
    """Exits with one sentence and status 2 if a dependency is missing; finds them without importing them."""
    missing = next((name for name in MODULES if importlib.util.find_spec(name) is None), None)
    if missing:
        print(
            f"error: pi_jax's dependency {missing} is not installed in {sys.executable}: activate the environment that "
            "has it, for example `source .venv/bin/activate`, or install it with `pip install -e .`",
            file=sys.stderr,
        )
        sys.exit(2)
