"""Measures the attention scores of a real model, to check what the theory of interpolation assumes.

The paper bounds |a(s)| by max|h_j| (`pi_jax.theory.bounds`) but does not examine h in a model. This module takes
queries and keys from one forward pass over a text and computes the score that each pair would have at distances inside
the window, beyond it, and beyond it with interpolation. Scores keep their sign, because only a large positive score
dominates the softmax. The command is `python -m pi_jax.theory --output DIR --model PATH --text FILE`.

Shapes: L layers, P sampled query-key pairs, M = P times heads, D distances, R = H/2 rotated pairs; S, D, N, K, H as in
`pi_jax.model`.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pi_jax import rope
from pi_jax.config import ComputeConfig, MeshConfig
from pi_jax.convert.open import open_model
from pi_jax.evaluate.perplexity.command import read_tokens
from pi_jax.model import Llama
from pi_jax.model.attention import attention
from pi_jax.parallel import sharding
from pi_jax.theory import bounds


@dataclasses.dataclass(frozen=True)
class Measured:
    """Scores of sampled query-key pairs of a model, at their own and at other distances.

    Scores and h are divided by sqrt(H), so they are in units of the softmax's argument.
    """

    window: int
    """Window of the model in tokens."""
    theta_R: np.ndarray
    largest_h_LM: np.ndarray
    """max_j|h_j| of each pair, per layer (M: pairs times heads)."""
    own_LM: np.ndarray
    """a(s) at the distance of the pair in the text."""
    inside_LMD: np.ndarray
    """a(s) at distances sampled from [0, window)."""
    beyond_LMD: np.ndarray
    """a(s) at distances sampled from [window, 2 window)."""
    interpolated_LMD: np.ndarray
    """a(s / 2) at the same distances: Position Interpolation with factor 2."""
    off_chord_LMD: np.ndarray
    """|a(s + 1/2) - (a(s) + a(s + 1)) / 2| at the distances inside the window."""


def measure(path: str, text: str, tokens: int = 1024, pairs: int = 128, distances: int = 64) -> Measured:
    """Takes queries and keys of all layers and heads from one pass over a text and computes scores at other distances.

    The pass is over `tokens` tokens, so the activations are those of the trained window, whatever its length. The pairs
    (a query and a key at or before it) and the distances are sampled with the seed `bounds.SEED`.

    Args:
      path: Hugging Face folder, Meta folder, or the folder of a pi_jax run.
      text: text file.
      tokens: number of tokens of the text to use.
      pairs: number of query-key pairs to sample.
      distances: number of distances to sample.

    Raises:
      InputError: if the model cannot be read or there is no text.
    """
    source = open_model(path)
    config = source.config
    _, documents = read_tokens([text], source.files, config.vocab_size, tokens)
    tokens_S = max(documents, key=len)
    rng = np.random.default_rng(bounds.SEED)
    queries_P = rng.integers(0, len(tokens_S), pairs)
    keys_P = rng.integers(0, queries_P + 1)
    mesh = sharding.make_mesh(MeshConfig(), jax.local_devices()[:1])
    with jax.set_mesh(mesh):
        model = source.load(ComputeConfig(dtype="float32", remat="none"), mesh)
    model = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), model)  # plain arrays without a mesh
    h_LMR = _products(*_queries_and_keys(model, tokens_S, queries_P, keys_P))

    theta_R = np.asarray(config.rope.inverse_frequencies(config.head_dim), np.float64)
    h_LMR = h_LMR * (config.rope.attention_scaling**2 / math.sqrt(config.head_dim))
    window = config.max_position_embeddings
    inside_D = rng.integers(0, window, distances)
    own_M = np.repeat(queries_P - keys_P, config.num_attention_heads)

    def at(distances_D):
        return np.real(h_LMR @ np.exp(1j * np.outer(theta_R, distances_D)).astype(h_LMR.dtype))

    here, next_ = at(inside_D), at(inside_D + 1)
    return Measured(
        window=window,
        theta_R=theta_R,
        largest_h_LM=np.abs(h_LMR).max(-1),
        own_LM=np.stack([bounds.score(h_MR, own_M, theta_R) for h_MR in h_LMR]),
        inside_LMD=here,
        beyond_LMD=at(inside_D + window),
        interpolated_LMD=at((inside_D + window) / 2),
        off_chord_LMD=np.abs(at(inside_D + 0.5) - (here + next_) / 2),
    )


def _queries_and_keys(model: Llama, tokens_S, queries_P, keys_P) -> tuple[np.ndarray, np.ndarray]:
    """Returns the queries [L, P, N, H] and keys [L, P, K, H] of all layers, before rotation, of the given tokens."""
    positions_BS = jnp.arange(len(tokens_S))[None]

    @jax.jit
    def run(model):
        cos_sin_BSR = rope.cos_sin(positions_BS, model.config.head_dim, model.config.rope)

        def block(x_BSD, layer):
            normed_SD = layer.attention_norm(x_BSD)[0]
            q_SNH, k_SKH = (
                jnp.einsum("SD,NHD->SNH", normed_SD, w[...]) for w in (layer.attention.q, layer.attention.k)
            )
            return layer(x_BSD, cos_sin_BSR, attention), (q_SNH[queries_P], k_SKH[keys_P])

        return jax.lax.scan(block, model.embedding[...][jnp.asarray(tokens_S)][None], model.layers)[1]

    q_LPNH, k_LPKH = run(model)
    return np.asarray(q_LPNH), np.asarray(k_LPKH)


def _products(q_LPNH: np.ndarray, k_LPKH: np.ndarray) -> np.ndarray:
    """Returns h_j = q_j conj(k_j) (Eq. 3) of all pairs and heads, [L, P * N, R]. Channel j pairs with j + H/2."""
    k_LPNH = np.repeat(k_LPKH, q_LPNH.shape[2] // k_LPKH.shape[2], axis=2)
    (q_re, q_im), (k_re, k_im) = (np.split(x, 2, axis=-1) for x in (q_LPNH, k_LPNH))
    h_LPNR = (q_re + 1j * q_im) * (k_re - 1j * k_im)
    return h_LPNR.reshape(h_LPNR.shape[0], -1, h_LPNR.shape[-1])


def summarize(m: Measured) -> dict[str, Any]:
    """Returns the statistics that `table` prints, over all layers and per layer."""

    def stats(part) -> dict[str, float]:
        h = m.largest_h_LM[part]
        found = {"h_median": np.median(h), "h_99": np.quantile(h, 0.99), "h_max": h.max()}
        for name in ("own_LM", "inside_LMD", "beyond_LMD", "interpolated_LMD"):
            values, short = getattr(m, name)[part], name.split("_")[0]
            found |= {short + "_99": np.quantile(values, 0.99), short + "_max": values.max()}
        return found | {"off_chord_per_h": (m.off_chord_LMD[part] / h[..., None]).max()}

    layers = [{k: float(v) for k, v in stats(i).items()} for i in range(len(m.own_LM))]
    everything = {k: float(v) for k, v in stats(slice(None)).items()}
    return {"window": m.window, "bound_per_h": float((m.theta_R**2).sum() / 8), "all": everything, "layers": layers}


def table(summary: dict[str, Any]) -> str:
    """Formats the result of `summarize` as a table."""
    groups = {"h": "max|h_j|", "own": "own", "inside": "inside", "beyond": "beyond", "interpolated": "interpolated"}
    lines = ["layer  " + "".join(f"{name:^19}" for name in groups.values()) + "   off chord"]
    lines.append("       " + f"{'99%':>8} {'largest':>9} " * len(groups) + "   / max|h_j|")
    rows = {"all": summary["all"]} | {str(i): row for i, row in enumerate(summary["layers"])}
    for name, row in rows.items():
        numbers = "".join(f"{row[group + '_99']:8.2f} {row[group + '_max']:9.2f} " for group in groups)
        lines.append(f"{name:>5}  {numbers}   {row['off_chord_per_h']:9.4f}")
    window = summary["window"]
    lines.append(
        f"Scores a(s) and h are in units of the softmax's argument. own: at the pair's distance in the text; inside: "
        f"s < {window};\nbeyond: {window} <= s < {2 * window}; interpolated: the same distances, halved. off chord: "
        f"largest |a(s + 1/2) - chord|; the bound is {summary['bound_per_h']:.4f}."
    )
    return "\n".join(lines)
