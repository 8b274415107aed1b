"""Every backend against the judge, and the judge against the definition: who sees whom, shown by gradients."""

import contextlib
import functools
import math
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pi_jax.config import MeshConfig
from pi_jax.model.attention import api, attention, chunked, device, sharded, splash
from pi_jax.model.attention.mask import Mask
from pi_jax.model.attention.reference import reference_attention
from pi_jax.parallel import sharding
from tests import topologies

ON_CPU = ("chunked", "pallas_triton", "splash")
"""Backends that a CPU can run, the kernels in interpret mode."""
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-2}


def _inputs(batch, q_len, kv_len, heads, kv_heads, head_dim, dtype="float32"):
    keys = jax.random.split(jax.random.key(q_len + kv_len + heads), 4)
    shapes = [(q_len, heads), (kv_len, kv_heads), (kv_len, kv_heads), (q_len, heads)]
    return [jax.random.normal(k, (batch, n, h, head_dim), dtype) for k, (n, h) in zip(keys, shapes, strict=True)]


def _results(q, k, v, cotangent, implementation, **arguments):
    """out, lse (where there is one) and the gradients of a function of both."""
    with_lse = implementation != "splash"

    def scalar(q, k, v):
        found = attention(q, k, v, implementation=implementation, return_lse=with_lse, **arguments)
        out, lse = found if with_lse else (found, jnp.zeros(()))
        finite = jnp.where(jnp.isfinite(lse), lse, 0.0)
        weighed = jnp.sum(jnp.sin(finite)) if arguments.get("scale") else 0.0  # lse has a gradient, too
        return jnp.sum(out.astype(jnp.float32) * cotangent.astype(jnp.float32)) + weighed, (out, finite)

    (_, (out, lse)), gradients = jax.jit(jax.value_and_grad(scalar, (0, 1, 2), has_aux=True))(q, k, v)
    return {"out": out, "dq": gradients[0], "dk": gradients[1], "dv": gradients[2]} | ({"lse": lse} if with_lse else {})


def _worst(expected, found):
    """Largest relative error in norm; of what is all but 0 (dq where one key is seen) relative to entries of 0.1."""
    errors = []
    for name, b in found.items():
        a, b = (np.asarray(x, np.float32) for x in (expected[name], b))
        assert np.isfinite(b).all()
        errors.append(np.linalg.norm(a - b) / max(np.linalg.norm(a), 0.1 * a.size**0.5))
    return max(errors)


def _documents(batch, length, kind):
    """Segment ids: one document; many, cut anywhere; padding (0) at the end; a row that is all padding."""
    if kind == "one":
        return None
    ids = np.zeros((batch, length), np.int32)
    if kind == "padded":
        ids[:, : length * 2 // 3] = 1
    elif kind in ("many", "padding"):
        starts = np.random.default_rng(length).integers(0, length, (batch, 4))
        ids = 1 + (np.arange(length)[None, :, None] >= starts[:, None, :]).sum(-1)
        if kind == "padding":
            ids[-1] = 0
    return jnp.asarray(ids, jnp.int32)


# Every length with every kind of row; heads, groups and head sizes take turns, and on long rows dtypes.
_HEADS = [(4, 4, 64), (6, 2, 96), (8, 2, 128), (8, 1, 64), (3, 1, 128), (4, 1, 96), (2, 2, 128)]
_KINDS = ("one", "many", "padded", "padding")


def _dtypes(length, number):
    if length in (1, 1000):
        return ("float32", "bfloat16") if length == 1000 and _KINDS[number] == "many" else ("float32",)
    return ("float32", "bfloat16") if length < 1000 else (("float32", "bfloat16")[number % 2],)


_CASES = [
    (length, kind, _HEADS[(5 * i + 2 * j) % 7], dtype)
    for i, length in enumerate((1, 17, 128, 1000, 2048))
    for j, kind in enumerate(_KINDS)
    for dtype in _dtypes(length, j)
]


def _marked(case):
    length, kind, _, dtype = case
    quick = kind == "many" if dtype == "bfloat16" or length in (1, 1000) else length < 1000
    slow = [] if quick and (length < 1000 or (dtype == "float32" and length == 1000)) else [pytest.mark.slow]
    return pytest.param(*case, id="-".join(map(str, case)), marks=slow)


@functools.lru_cache(maxsize=2)
def _judged(length, kind, heads, dtype):
    """Arguments of a case, what the reference makes of them, and what it would make of the classic mistakes."""
    arrays = _inputs(2, length, length, *heads, dtype)
    segments = _documents(2, length, kind)
    exact = [x.astype(jnp.float32) for x in arrays]
    mistakes = [{"segment_ids": segments, "q_positions": 1 + jnp.arange(length)[None].repeat(2, 0)}]
    mistakes += [{}] if segments is not None else []
    wrong = [attention(*exact[:3], implementation="reference", **m) for m in mistakes if length > 1]
    return arrays, segments, _results(*exact, "reference", segment_ids=segments), wrong


@pytest.mark.parametrize(("length", "kind", "heads", "dtype"), [_marked(case) for case in _CASES])
@pytest.mark.parametrize("implementation", ON_CPU)
def test_equals_reference(implementation, length, kind, heads, dtype, monkeypatch):
    monkeypatch.setattr(chunked, "BLOCK", 128)  # so that short rows have several blocks, and boundaries inside them
    monkeypatch.setattr(splash, "BLOCK", 128)
    arrays, segments, expected, wrong = _judged(length, kind, heads, dtype)
    found = _results(*arrays, implementation, segment_ids=segments)
    assert found["out"].dtype == dtype
    assert _worst(expected, found) < TOLERANCE[dtype]
    # The control: had documents been ignored, or the diagonal been one off, this comparison would have seen it.
    for out in wrong:
        assert _worst({"out": out}, {"out": found["out"]}) > 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("mistake", ["segments", "diagonal"])
@pytest.mark.parametrize("implementation", ON_CPU)
def test_a_broken_backend_is_seen(implementation, mistake, monkeypatch):
    """The two classic mistakes, made inside each backend."""
    q, k, v, cotangent = _inputs(2, 200, 200, 4, 2, 64)
    segments = _documents(2, 200, "many")
    expected = _results(q, k, v, cotangent, "reference", segment_ids=segments)
    assert _worst(expected, _results(q, k, v, cotangent, implementation, segment_ids=segments)) < 1e-5
    if mistake == "diagonal" and implementation == "splash":
        plain = splash.masks.CausalMask
        monkeypatch.setattr(splash.masks, "CausalMask", lambda shape: plain(shape, offset=1))
    else:

        def broken(q_order, q_segments, kv_order, kv_segments, **flags):
            if mistake == "segments":
                return Mask(q_order, 0 * q_segments, kv_order, 0 * kv_segments, **flags)
            return Mask(q_order + 1, q_segments, kv_order, kv_segments, **flags)

        monkeypatch.setattr(api, "Mask", broken)
    assert _worst(expected, _results(q, k, v, cotangent, implementation, segment_ids=segments)) > 5e-2


@pytest.mark.parametrize("implementation", ["chunked", "pallas_triton"])
@pytest.mark.parametrize("order", ["shard", "reversed", "zigzag"])
def test_queries_and_keys_in_any_order(implementation, order, monkeypatch):
    """A part of the queries meets all keys, as where a row is split over devices; values and gradients."""
    monkeypatch.setattr(chunked, "BLOCK", 128)
    length = 512
    q, k, v, cotangent = _inputs(1, length, length, 4, 2, 64)
    segments = _documents(1, length, "many")
    rows, columns = {
        "shard": (np.arange(150, 380), np.arange(length)),
        "reversed": (np.arange(150, 380), np.arange(length)[::-1]),
        "zigzag": (np.r_[128:192, 320:384], np.arange(length).reshape(8, 64)[[0, 7, 1, 6, 2, 5, 3, 4]].reshape(-1)),
    }[order]
    arguments = {
        "segment_ids": (segments[:, rows], segments[:, columns]),
        "q_positions": jnp.asarray(rows)[None],
        "kv_positions": jnp.asarray(columns)[None],
        "scale": 0.2,  # and lse takes part in the gradient
    }
    part = (q[:, rows], k[:, columns], v[:, columns], cotangent[:, rows])
    expected = _results(*part, "reference", **arguments)
    assert _worst(expected, _results(*part, implementation, **arguments)) < 1e-5
    whole = attention(q, k, v, segment_ids=segments, scale=0.2, implementation="reference")
    np.testing.assert_allclose(expected["out"], whole[:, rows], atol=1e-5)
    arguments["q_positions"] += 1
    assert _worst(expected, _results(*part, implementation, **arguments)) > 5e-2


@pytest.mark.parametrize(
    ("implementation", "sizes"),
    [("pallas_triton", {"context": 2, "tensor": 2}), ("splash", {"fsdp": 2, "tensor": 2}), ("auto", {"context": 4})],
)
def test_on_a_mesh(implementation, sizes):
    """Rows, heads and (but for splash) the queries of a row on several devices."""
    mesh = sharding.make_mesh(MeshConfig(**{"data": 8 // math.prod(sizes.values()), "fsdp": 1, **sizes}))
    q, k, v, _ = _inputs(4, 128, 128, 4, 2, 64)
    segments = _documents(4, 128, "many")
    expected = attention(q, k, v, segment_ids=segments, implementation="reference")
    with jax.set_mesh(mesh):
        axes = [("batch", "sequence", "heads", None)] + 2 * [("batch", "sequence", "kv_heads", None)]
        arrays = [jax.device_put(x, sharding.named(mesh, a)) for x, a in zip((q, k, v), axes, strict=True)]
        segments = jax.device_put(segments, sharding.named(mesh, ("batch", "sequence")))
        backend = functools.partial(attention, implementation=implementation)
        found = jax.jit(functools.partial(sharded.attend, backend))(*arrays, segments)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("implementation", ["reference", "chunked", "pallas_triton"])
def test_a_query_that_sees_nothing_gets_zeros(implementation):
    q, k, v, cotangent = _inputs(1, 20, 40, 2, 1, 64)
    segments = (jnp.zeros((1, 20), jnp.int32).at[:, 5].set(7), jnp.zeros((1, 40), jnp.int32))
    found = _results(q, k, v, cotangent, implementation, segment_ids=segments, scale=0.2)
    assert all(np.isfinite(x).all() for x in found.values())
    assert not found["out"][:, 5].any() and not found["dq"][:, 5].any() and found["out"][:, 6].all()
    _, lse = attention(q, k, v, segment_ids=segments, implementation=implementation, return_lse=True)
    assert np.isneginf(lse[:, 5]).all() and np.isfinite(lse[:, 6]).all()


@pytest.mark.parametrize("implementation", ["reference", *ON_CPU])
def test_gradients_show_causality_and_isolation(implementation):
    """d out[i] / d v[j] is exactly 0 for a later token or another document, and not 0 otherwise."""
    length = 150
    q, k, v, _ = _inputs(1, length, length, 2, 1, 64)
    segments = _documents(1, length, "many")

    def out_of(v):
        return attention(q, k, v, segment_ids=segments, implementation=implementation)[0, :, 0].sum(-1)

    reach = jnp.abs(jax.jacobian(out_of)(v)[:, 0]).sum((-1, -2))
    order, ids = np.arange(length), np.asarray(segments[0])
    may = (order[None] <= order[:, None]) & (ids[None] == ids[:, None])
    np.testing.assert_array_equal(np.asarray(reach) != 0, may)


# --- What is not computed


def _mask(segments, order=None):
    order = jnp.arange(segments.shape[1])[None] if order is None else order
    return Mask(order, segments, order, segments, in_order=False, one_document=False)


def test_block_ranges_hold_all_that_is_visible():
    rng = np.random.default_rng(0)
    for case in range(20):
        order = np.arange(96) if case % 2 else rng.permutation(96)
        segments = np.sort(rng.integers(0, 4, 96)) if case % 4 else rng.integers(0, 3, 96)
        mask = _mask(jnp.asarray(segments)[None], jnp.asarray(order)[None])
        visible = np.asarray(mask.visible()[0])
        for ranges, seen, block, other in zip(
            mask.block_ranges(16, 32), (visible, visible.T), (16, 32), (32, 16), strict=True
        ):
            for i, (first, whole_first, whole_last, last) in enumerate(np.asarray(ranges[0])):
                rows = seen[i * block : (i + 1) * block]
                assert first <= whole_first <= whole_last <= last
                assert not rows[:, : first * other].any() and not rows[:, last * other :].any()
                assert rows[:, whole_first * other : whole_last * other].all()


def test_packed_documents_cost_what_they_would_cost_alone():
    """Four documents of two blocks each: 12 pairs of blocks instead of 36, all but the diagonal without a mask."""
    segments = (jnp.arange(1024) // 256)[None]
    for ids, pairs, whole in ((segments, 12, 4), (0 * segments, 36, 28)):
        for ranges in _mask(ids).block_ranges(128, 128):
            first, whole_first, whole_last, last = jnp.moveaxis(ranges, -1, 0)
            assert (last - first).sum() == pairs and (whole_last - whole_first).sum() == whole
        (_, partners), _ = chunked._overlaps(_mask(ids), 128, 128)
        assert partners.sum() == pairs


@pytest.mark.parametrize("implementation", ["chunked", "pallas_triton"])
def test_blocks_of_other_documents_are_not_read(implementation, monkeypatch):
    """Not a number in one document's queries, keys and values never reaches another, though 0 * nan is nan."""
    monkeypatch.setattr(chunked, "BLOCK", 128)
    q, k, v, cotangent = _inputs(1, 384, 384, 2, 1, 64)
    segments = (jnp.arange(384) // 128)[None]
    clean = _results(q, k, v, cotangent, implementation, segment_ids=segments)
    q, k, v = (x.at[:, 128:256].set(jnp.nan) for x in (q, k, v))
    others = np.r_[:128, 256:384]

    def loss(q, k, v):
        out = attention(q, k, v, segment_ids=segments, implementation=implementation)
        return jnp.sum(out * cotangent)

    for name, found in zip(("dq", "dk", "dv"), jax.grad(loss, (0, 1, 2))(q, k, v), strict=True):
        np.testing.assert_allclose(found[:, others], clean[name][:, others], atol=1e-5)
        assert np.isnan(found[:, 128:256]).any()


# --- Which backend is chosen, and what each refuses


@pytest.mark.parametrize(
    ("capability", "case", "expected"),
    [
        ((9, 0), {}, "cudnn"),
        ((9, 0), {"segments": True}, "pallas_triton"),
        ((9, 0), {"positions": True}, "pallas_triton"),
        ((9, 0), {"return_lse": True}, "pallas_triton"),
        ((9, 0), {"dtype": "float32"}, "pallas_triton"),
        ((8, 0), {}, "pallas_triton"),
        ((8, 6), {"segments": True}, "pallas_triton"),
        ((8, 0), {"head_dim": 512}, "chunked"),
        (None, {}, "chunked"),
    ],
)
def test_auto_chooses_by_device_and_arguments(capability, case, expected):
    q = jax.ShapeDtypeStruct((1, 64, 2, case.get("head_dim", 64)), case.get("dtype", "bfloat16"))
    rows = jnp.zeros((1, 64), jnp.int32)
    mask = Mask(rows, rows, rows, rows, in_order="positions" not in case, one_document="segments" not in case)
    with topologies.abstract_gpu(capability) if capability else contextlib.nullcontext():
        assert api._choose("auto", q, q, mask, case.get("return_lse", False)) == expected


@pytest.mark.parametrize(
    ("implementation", "change", "words"),
    [
        ("cudnn", {}, "runs on an NVIDIA GPU"),
        ("splash", {"q_positions": jnp.zeros((1, 64), jnp.int32)}, "takes no q_positions"),
        ("splash", {"return_lse": True}, "takes no return_lse"),
        ("splash", {"dtype": "float16"}, "float32 and bfloat16"),
        ("pallas_triton", {"head_dim": 512}, "head sizes up to 256, not 512"),
    ],
)
def test_what_a_backend_cannot_honour_it_refuses(implementation, change, words):
    change = dict(change)
    x = jnp.zeros((1, 64, 2, change.pop("head_dim", 64)), change.pop("dtype", "bfloat16"))
    with pytest.raises(ValueError, match=f"implementation is '{implementation}', which .*{words}"):
        attention(x, x, x, implementation=implementation, **change)


def test_cudnn_refuses_documents():
    """What other systems ignore in silence: their packed documents read each other."""
    x = jax.ShapeDtypeStruct((1, 64, 2, 64), jnp.bfloat16)
    rows = jnp.zeros((1, 64), jnp.int32)
    with topologies.abstract_gpu((9, 0)), pytest.raises(ValueError, match="'cudnn', which .*segment_ids"):
        api._choose("cudnn", x, x, Mask(rows, rows, rows, rows, in_order=True, one_document=False), False)


@pytest.mark.parametrize(
    ("head_dim", "dtype"), [(64, "bfloat16"), (96, "float16"), (128, "bfloat16"), (128, "float32"), (256, "bfloat16")]
)
@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0)])
def test_triton_kernels_lower_for_gpus(capability, head_dim, dtype):
    """Forward and backward for a GPU, without the hardware, and nothing of size length x length in it."""
    q, k = (jax.ShapeDtypeStruct((1, 4096, n, head_dim), dtype) for n in (8, 2))
    segments = jax.ShapeDtypeStruct((1, 4096), jnp.int32)

    def loss(q, k, v, segments):
        out = attention(q, k, v, segment_ids=segments, implementation="pallas_triton")
        return jnp.sum(out.astype(jnp.float32))

    with topologies.abstract_gpu(capability):
        lowered = jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, k, k, segments).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    assert all(f"{name}_kernel" in text for name in ("forward", "dq", "dkv"))
    assert text.count("gpu.triton") == 3 and "4096x4096" not in text


@pytest.mark.parametrize(("told", "expected"), [("9.0", (9, 0)), ("12.0", (12, 0)), ("gfx90a", (0, 0)), (None, (8, 0))])
def test_compute_capability_is_what_the_device_says(told, expected, monkeypatch):
    found = types.SimpleNamespace(platform="gpu", device_kind="?", compute_capability=told)
    monkeypatch.setattr(device, "_device", lambda: found)
    assert device.compute_capability() == expected
    if told == "gfx90a":
        x = jax.ShapeDtypeStruct((1, 64, 2, 64), jnp.bfloat16)
        rows = jnp.zeros((1, 64), jnp.int32)
        mask = Mask(rows, rows, rows, rows, in_order=True, one_document=True)
        assert api._choose("auto", x, x, mask, False) == "chunked"
        with pytest.raises(ValueError, match="needs an NVIDIA GPU"):
            api._choose("pallas_triton", x, x, mask, False)


def test_the_reference_is_the_definition():
    """Against a loop in NumPy float64."""
    q, k, v, _ = (np.asarray(x, np.float64) for x in _inputs(1, 9, 9, 2, 1, 8))
    ids = np.array([1, 1, 1, 2, 2, 2, 2, 0, 0])
    expected = np.zeros((9, 2, 8))
    for i in range(9):
        seen = [j for j in range(i + 1) if ids[j] == ids[i]]
        for head in range(2):
            weights = np.exp([q[0, i, head] @ k[0, j, 0] * 0.3 for j in seen])
            expected[i, head] = weights @ v[0, seen, 0] / weights.sum()
    found, _ = reference_attention(
        *(jnp.asarray(x, jnp.float32) for x in (q, k, v)), _mask(jnp.asarray(ids)[None]), 0.3
    )
    np.testing.assert_allclose(found[0], expected, atol=1e-6)


def test_a_bad_pair_of_segment_ids_is_named():
    x = jnp.zeros((2, 8, 4, 16))
    pair = (jnp.zeros((2, 8), jnp.int32), jnp.zeros((2, 9), jnp.int32))
    with pytest.raises(ValueError, match=r"segment_ids has shape \(2, 9\): it must be \(2, 8\)"):
        attention(x, x, x, segment_ids=pair)
    with pytest.raises(ValueError, match="segment_ids is one array but there are 4 queries and 8 keys"):
        attention(x[:, :4], x, x, segment_ids=pair[0])


def test_float64_is_refused():
    x = np.zeros((2, 8, 4, 16), np.float64)
    with pytest.raises(ValueError, match="q is float64: it must be one of float32, bfloat16, float16"):
        attention(x, x, x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": (2, 8, 3, 16)}, "k has 2 heads"),
        ({"k": (2, 8, 2, 32)}, r"v has shape .* but k has"),
        ({"q": (1, 8, 4, 16)}, "batch and head size"),
        ({"q": (2, 8, 64)}, "4 dimensions"),
        ({"segment_ids": (2, 7)}, r"segment_ids has shape \(2, 7\): it must be \(2, 8\)"),
        ({"q_positions": (1, 8)}, "q_positions has shape"),
        ({"implementation": "magic"}, "implementation is 'magic'.*chunked"),
        ({"dtype": "int32"}, "q is int32"),
        ({"scale": -1.0}, "scale is -1.0"),
        ({"k_dtype": "bfloat16"}, "k is bfloat16 but q is float32"),
    ],
)
def test_bad_arguments_are_named(change, message):
    shapes = {"q": (2, 8, 4, 16), "k": (2, 8, 2, 16), "v": (2, 8, 2, 16)}
    dtype = change.pop("dtype", "float32")
    dtypes = {"q": dtype, "k": change.pop("k_dtype", dtype), "v": dtype}
    arrays = {n: jnp.zeros(change.pop(n, s), dtypes[n]) for n, s in shapes.items()}
    arguments = {n: jnp.zeros(s, jnp.int32) if isinstance(s, tuple) else s for n, s in change.items()}
    with pytest.raises(ValueError, match=message):
        attention(arrays["q"], arrays["k"], arrays["v"], **arguments)


_LONG = """
import re, jax, jax.numpy as jnp
from pi_jax.model.attention import attention
q, k, v = (jax.random.normal(key, (1, 32768, 4, 64)) for key in jax.random.split(jax.random.key(0), 3))
grads = jax.jit(jax.grad(lambda *x: jnp.sum(attention(*x, implementation="chunked") ** 2), (0, 1, 2)))(q, k, v)
assert all(bool(jnp.isfinite(g).all()) for g in grads)
# Not ru_maxrss: that begins with the peak of the process that started this one.
print(int(re.search("VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 2**20)
"""


@pytest.mark.slow
def test_32k_tokens_fit_in_bounded_memory():
    """Forward and backward of 32,768 tokens, 4 heads of 64, float32: all of one process in 1.5 GiB."""
    done = subprocess.run([sys.executable, "-c", _LONG], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1.5
