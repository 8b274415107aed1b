"""The schema of an experiment, its validation and its command-line parsing."""

from pi_jax.config.cli import describe, flatten, load_config, parse
from pi_jax.config.extend import extend
from pi_jax.config.schema import (
    BUILTIN,
    CheckpointConfig,
    ComputeConfig,
    Config,
    DataConfig,
    DType,
    EvaluateConfig,
    LoggingConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    ProfileConfig,
    RopeConfig,
    TrainConfig,
)
from pi_jax.config.smoke import smoke

__all__ = [
    "BUILTIN",
    "CheckpointConfig",
    "ComputeConfig",
    "Config",
    "DType",
    "DataConfig",
    "EvaluateConfig",
    "LoggingConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ProfileConfig",
    "RopeConfig",
    "TrainConfig",
    "describe",
    "extend",
    "flatten",
    "load_config",
    "parse",
    "smoke",
]
