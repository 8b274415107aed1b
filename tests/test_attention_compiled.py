"""The kernels compiled for A100, H100 and TPUs without any: registers, shared memory, tensor cores, memory at 32k.

`make test-compiled` makes an environment that has the compilers. Two ways for GPUs: a kernel's Triton code through the
`triton` package and NVIDIA's ptxas, which counts registers; and XLA as on a GPU machine, which carries its own revision
of Triton, so the counts of the first are a close guide to the second, not the same.
"""

import importlib.util
import pathlib
import re
import subprocess

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from pi_jax.model.attention import attention, pallas_triton
from pi_jax.model.attention.custom_vjp import SAVED_NAME
from tests import topologies

pytestmark = pytest.mark.compiled

ARCHITECTURES = {(8, 0): "sm_80", (8, 6): "sm_86", (9, 0): "sm_90a"}

SPILLED = {
    # (capability, head size): most bytes a thread may spill in forward, dq, dk/dv; as found with triton 3.9.0 and ptxas
    # 13.5, rounded up. What is spilled on the A100 and the H100 is about 15 registers a visited block, beside some 250
    # tensor-core instructions.
    ((8, 0), 64): (64, 0, 0),
    ((8, 0), 128): (600, 0, 0),
    ((8, 6), 64): (0, 0, 0),
    ((8, 6), 128): (0, 0, 0),
    ((9, 0), 64): (0, 0, 0),
    ((9, 0), 128): (0, 0, 640),
}


def _grad(implementation, masked=True):
    def loss(q, k, v, segments):
        out = attention(q, k, v, segment_ids=segments if masked else None, implementation=implementation)
        return jnp.sum(jnp.square(out.astype(jnp.float32)))

    return jax.grad(loss, (0, 1, 2))


def _shapes(length, head_dim, sharding=None, heads=8, kv_heads=2):
    q, k = (jax.ShapeDtypeStruct((1, length, n, head_dim), jnp.bfloat16, sharding=sharding) for n in (heads, kv_heads))
    return q, k, k, jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=sharding)


def _triton_code(capability, head_dim, monkeypatch) -> dict[str, str]:
    """Name of each kernel -> its code in Triton's language, as JAX hands it to XLA."""
    from jax._src.pallas.triton import lowering

    code, lower = {}, lowering.lower_jaxpr_to_triton_module

    def recording(jaxpr, *args, **kwargs):
        result = lower(jaxpr, *args, **kwargs)
        code[jaxpr.debug_info.func_name] = result.module.operation.get_asm(enable_debug_info=False)
        return result

    monkeypatch.setattr(lowering, "lower_jaxpr_to_triton_module", recording)
    with topologies.abstract_gpu(capability):
        jax.jit(_grad("pallas_triton")).trace(*_shapes(4096, head_dim)).lower(lowering_platforms=("cuda",))
    return code


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("capability", list(ARCHITECTURES))
def test_triton_kernels_fit_the_chip(capability, head_dim, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    import triton
    from triton.backends.compiler import GPUTarget

    ptxas = pathlib.Path(importlib.util.find_spec("nvidia").submodule_search_locations[0]) / "cu13/bin/ptxas"
    tiles = pallas_triton.tiles(head_dim, jnp.bfloat16, capability)
    code = _triton_code(capability, head_dim, monkeypatch)
    names = ("forward_kernel", "dq_kernel", "dkv_kernel")
    assert set(code) == set(names)
    for name, tile, allowed in zip(
        names, (tiles.forward, tiles.dq, tiles.dkv), SPILLED[capability, head_dim], strict=True
    ):
        (tmp_path / f"{name}.ttir").write_text(code[name])
        target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
        options = {"num_warps": tile.warps, "num_stages": tile.stages}
        compiled = triton.compile(str(tmp_path / f"{name}.ttir"), target=target, options=options)
        assert compiled.metadata.shared <= topologies.SHARED_MEMORY[capability], name
        ptx = compiled.asm["ptx"]
        assert ptx.count("wgmma.mma_async" if capability == (9, 0) else "mma.sync") >= 16, name
        (tmp_path / "kernel.ptx").write_text(ptx)
        report = subprocess.run(
            [ptxas, "-v", "--gpu-name", ARCHITECTURES[capability], tmp_path / "kernel.ptx", "-o", tmp_path / "cubin"],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
        spilled = sum(map(int, re.findall(r"(\d+) bytes spill stores", report)))
        print(f"{capability} {head_dim} {name}: {compiled.metadata.shared} B shared memory, {spilled} B spilled")
        assert "spill stores" in report and spilled <= allowed, name


def _temporary_bytes(mesh, platform, implementation, length, head_dim=128, masked=True) -> int:
    """Memory that forward and backward need beside arguments and results, by XLA compiling for that device."""
    shapes = _shapes(length, head_dim, NamedSharding(mesh, PartitionSpec()))

    def local(*arrays):
        return jax.shard_map(_grad(implementation, masked), out_specs=PartitionSpec(), check_vma=False)(*arrays)

    options = {"xla_gpu_autotune_level": 0} if platform == "cuda" else None
    with jax.set_mesh(mesh):
        lowered = jax.jit(local).trace(*shapes).lower(lowering_platforms=(platform,))
        return lowered.compile(compiler_options=options).memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("length", [1, 17, 100])
@pytest.mark.parametrize("head_dim", [32, 128])
def test_short_rows_compile_for_a_gpu(length, head_dim):
    """Their blocks are smaller than those of the table."""
    _temporary_bytes(topologies.gpu_mesh((9, 0)), "cuda", "pallas_triton", length, head_dim)


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_gpu_memory_is_linear_in_length(capability, head_dim):
    mesh = topologies.gpu_mesh(capability)
    half, whole = (_temporary_bytes(mesh, "cuda", "pallas_triton", n, head_dim) for n in (16384, 32768))
    print(f"{capability} {head_dim}: {half / 2**20:.0f} MiB at 16k, {whole / 2**20:.0f} MiB at 32k")
    assert whole <= 2.2 * half
    assert whole < 2**28  # a float32 score for each pair of tokens and head would be 32 GiB


def test_a_remat_policy_spares_the_second_forward_pass():
    mesh = topologies.gpu_mesh((9, 0))

    def kernels(policy):
        def loss(q, k, v):
            run = jax.checkpoint(lambda q: attention(q, k, v, implementation="pallas_triton"), policy=policy)
            return jnp.sum(jnp.square(run(q).astype(jnp.float32)))

        shapes = _shapes(1024, 64, NamedSharding(mesh, PartitionSpec()))[:3]
        with jax.set_mesh(mesh):
            lowered = jax.jit(jax.grad(loss)).trace(*shapes).lower(lowering_platforms=("cuda",))
            text = lowered.compile(compiler_options={"xla_gpu_autotune_level": 0}).as_text()
        return len(re.findall(r"custom-call\(.*forward_kernel", text))

    assert kernels(jax.checkpoint_policies.nothing_saveable) == 2
    assert kernels(jax.checkpoint_policies.save_only_these_names(SAVED_NAME)) == 1


@pytest.mark.parametrize("name", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
@pytest.mark.parametrize(("head_dim", "masked"), [(128, True), (128, False), (64, True)])
def test_splash_compiles_for_tpus_in_half_a_gibibyte(name, head_dim, masked):
    temporary = _temporary_bytes(topologies.tpu_mesh(name), "tpu", "splash", 32768, head_dim, masked)
    print(f"{name} {head_dim}: {temporary / 2**20:.0f} MiB")
    assert temporary <= 2**29


def test_auto_takes_splash_on_a_tpu():
    mesh = topologies.tpu_mesh("v5e:2x2")
    with jax.set_mesh(mesh):
        text = str(jax.make_jaxpr(lambda q, k, v: attention(q, k, v))(*_shapes(1024, 128)[:3]))
    assert "splash" in text
