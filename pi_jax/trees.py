"""Names for the leaves of a pytree: how checkpoints, weight tables and messages speak of parameters."""

from collections.abc import Callable
from typing import Any

import jax


def path_name(path: tuple[Any, ...]) -> str:
    """'layers.attention.q' for the path of a leaf: attributes, keys and indices, without NNX's final 'value'."""
    parts = [str(getattr(p, "name", getattr(p, "key", getattr(p, "idx", None)))) for p in path]
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "value" else parts)


def by_name(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """The leaves of a pytree by their names."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf)[0]}


def map_with_name(function: Callable[..., Any], tree: Any) -> Any:
    """`jax.tree.map` whose function gets each leaf's name first."""
    return jax.tree.map_with_path(lambda path, leaf: function(path_name(path), leaf), tree)
