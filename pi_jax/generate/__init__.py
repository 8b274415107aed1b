"""Text generation over a static, sharded KV cache."""

from pi_jax.generate.generator import Generator, require_mesh, stop_tokens, warn_beyond_window

__all__ = ["Generator", "require_mesh", "stop_tokens", "warn_beyond_window"]
