"""Speed and memory of every attention backend that this machine can run, compared with PyTorch's in the same run.

    python benchmarks/attention.py --output benchmarks/results/NAME.json

On a GPU: bfloat16, 32 query heads, head sizes 64 and 128, 4k to 64k tokens, grouped heads, dense causal sequences and
packed documents. On a CPU: the same with small sizes in float32, to check that the benchmark runs.

TFLOP/s count only unmasked scores: forward 4 * heads * head size * (pairs of a query and a key it attends to), backward
2.5 times that (five products instead of two). A backend that computes masked scores therefore has a lower figure, and
packed sequences are comparable with dense ones. A time is the fastest of several measurements, each over several
consecutive calls. Memory is what XLA allocates besides arguments and results. Each backend is first compared with
`reference`: values and gradients in float32.
"""

import dataclasses
import datetime
import itertools
import json
import platform
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from pi_jax.model.attention import IMPLEMENTATIONS, attention

BACKWARD = 2.5
"""Arithmetic of the backward pass, in forward passes."""


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Attention backends: TFLOP/s, memory, and errors against the reference."""

    lengths: tuple[int, ...] = ()
    """Tokens per sequence; empty: 4096 to 65536 on a GPU or TPU, 512 and 1024 on a CPU."""
    head_dims: tuple[int, ...] = (64, 128)
    groups: tuple[int, ...] = (1, 4, 8)
    """Query heads for each key/value head."""
    heads: int = 0
    """Query heads; 0: 32, or 8 on a CPU."""
    document: int = 0
    """Tokens per packed document; 0: 2048, or a quarter of the sequence if that is less."""
    implementations: tuple[str, ...] = ()
    """None: all that run here; interpreted kernels do not count."""
    repeats: int = 5
    """Times that are taken, of which the fastest counts."""
    torch: bool = True
    """Also PyTorch's scaled_dot_product_attention, on the same kind of device, if it is installed."""
    output: str = ""
    """JSON file for the result."""


@dataclasses.dataclass(frozen=True)
class Case:
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    document: int
    """Tokens per document in the sequence."""
    dtype: str

    @property
    def documents(self) -> int:
        return self.length // self.document

    def forward_flops(self) -> float:
        pairs = self.documents * self.document * (self.document + 1) / 2
        return 4 * self.heads * self.head_dim * pairs

    def arrays(self) -> list[np.ndarray]:
        rng = np.random.default_rng(0)
        heads = (self.heads, self.kv_heads, self.kv_heads, self.heads)
        return [rng.standard_normal((1, self.length, n, self.head_dim), np.float32) for n in heads]


def main(args: Benchmark) -> None:
    kind = jax.default_backend()
    cpu = kind == "cpu"
    lengths = args.lengths or ((512, 1024) if cpu else (4096, 8192, 16384, 32768, 65536))
    names = args.implementations or (
        ("chunked", "reference") if cpu else ("pallas_triton", "cudnn", "splash", "chunked")
    )
    heads, dtype = args.heads or (8 if cpu else 32), "float32" if cpu else "bfloat16"
    result = {
        "command": "benchmarks/attention.py",
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "machine": f"{platform.machine()}, {kind}",
        "jax": jax.__version__,
        "flops": "forward 4 * heads * head_dim * visible pairs; backward 2.5 times that",
        "errors": errors([n for n in names if n != "reference"], dtype),
        "rows": [],
    }
    print(json.dumps({k: v for k, v in result.items() if k != "rows"}, indent=1))
    for head_dim, group, length in itertools.product(args.head_dims, args.groups, lengths):
        if heads % group:
            continue
        packed = min(args.document or 2048, length // 4)
        for document in (length, packed):
            case = Case(length, heads, heads // group, head_dim, document, dtype)
            runs = {name: (lambda c, name=name: ours(c, name, args.repeats)) for name in names}
            if args.torch:
                runs["torch"] = lambda c: torchs(c, args.repeats, cpu)
            for name, run in runs.items():
                row = {"implementation": name, **dataclasses.asdict(case)}
                try:
                    row |= run(case)
                except (ValueError, ImportError, RuntimeError) as error:  # refused, not installed, out of memory
                    row |= {"failed": str(error).splitlines()[0][:200]}
                result["rows"].append(row)
                print(line(row), flush=True)
    if args.output:
        with open(args.output, "w") as file:
            file.write(json.dumps(result, indent=1) + "\n")


def line(row: dict) -> str:
    what = f"{row['implementation']:14} H{row['head_dim']} {row['heads']}/{row['kv_heads']} {row['length']:6}"
    what += " dense " if row["document"] == row["length"] else f" {row['length'] // row['document']:2} docs"
    if "failed" in row:
        return f"{what}  {row['failed']}"
    memory = f"  {row['temporary_mib']:7.0f} MiB" if "temporary_mib" in row else ""
    return f"{what}  forward {row['forward_tflops']:8.3f}  both {row['both_tflops']:8.3f} TFLOP/s{memory}"


def _timed(call: Callable[[], None], wait: Callable[[], None], repeats: int) -> float:
    """Seconds per call: the fastest of several measurements, each long enough for the clock."""
    call()
    wait()
    started = time.perf_counter()
    call()
    wait()
    calls = max(1, int(0.05 / (time.perf_counter() - started)))
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        for _ in range(calls):
            call()
        wait()
        times.append((time.perf_counter() - started) / calls)
    return min(times)


def _speeds(case: Case, forward: float, both: float) -> dict:
    flops = case.forward_flops()
    return {
        "forward_ms": 1e3 * forward,
        "both_ms": 1e3 * both,
        "forward_tflops": flops / forward / 1e12,
        "both_tflops": (1 + BACKWARD) * flops / both / 1e12,
        "backward_tflops": BACKWARD * flops / max(both - forward, 1e-9) / 1e12,
    }


def _functions(case: Case, name: str):
    segments = jnp.arange(case.length)[None] // case.document if case.documents > 1 else None

    def forward(q, k, v):
        return attention(q, k, v, segment_ids=segments, implementation=name)

    def both(q, k, v, d_out):
        out, backward = jax.vjp(forward, q, k, v)
        return out, backward(d_out)

    return forward, both


def ours(case: Case, name: str, repeats: int) -> dict:
    arrays = [jnp.asarray(x, case.dtype) for x in case.arrays()]
    forward, both = _functions(case, name)
    times = []
    for function, given in ((forward, arrays[:3]), (both, arrays)):
        compiled = jax.jit(function).lower(*given).compile()
        last = []

        def call(compiled=compiled, given=given, last=last):
            last[:] = [compiled(*given)]

        times.append(_timed(call, lambda last=last: jax.block_until_ready(last), repeats))
    memory = compiled.memory_analysis().temp_size_in_bytes / 2**20
    return _speeds(case, *times) | {"temporary_mib": memory}


def torchs(case: Case, repeats: int, cpu: bool) -> dict:
    """PyTorch with its default kernel. Documents, all of one length, form a batch, which is its best case."""
    import torch

    if not cpu and not torch.cuda.is_available():
        raise ImportError("torch sees no GPU")
    device = "cpu" if cpu else "cuda"
    q, k, v, d_out = (
        torch.tensor(x.reshape(case.documents, case.document, -1, case.head_dim), device=device)
        .to(getattr(torch, case.dtype))
        .transpose(1, 2)
        for x in case.arrays()
    )
    for x in (q, k, v):
        x.requires_grad_()

    def forward():
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=case.heads != case.kv_heads
        )

    def inference():
        with torch.no_grad():
            forward()

    wait = (lambda: None) if cpu else torch.cuda.synchronize
    seconds = _timed(inference, wait, repeats)
    both = _timed(lambda: torch.autograd.grad(forward(), (q, k, v), d_out), wait, repeats)
    return _speeds(case, seconds, both) | {"torch": torch.__version__}


def errors(names: list[str], dtype: str) -> dict:
    """Relative error in norm of out, dq, dk and dv against the float32 reference, 2,048 tokens in packed documents."""
    case = Case(2048, 8, 2, 128, 512, dtype)
    arrays = [jnp.asarray(x, case.dtype) for x in case.arrays()]
    with jax.default_matmul_precision("highest"):
        expected = jax.jit(_functions(case, "reference")[1])(*(x.astype(jnp.float32) for x in arrays))
    worst = {}
    for name in names:
        try:
            found = jax.jit(_functions(case, name)[1])(*arrays)
        except ValueError as error:
            worst[name] = str(error)
            continue
        pairs = zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True)
        worst[name] = [float(jnp.linalg.norm(a - b.astype(jnp.float32)) / jnp.linalg.norm(a)) for a, b in pairs]
    return worst


if __name__ == "__main__":
    args = tyro.cli(Benchmark, description=__doc__)
    unknown = set(args.implementations) - set(IMPLEMENTATIONS)
    if unknown:
        raise SystemExit(
            f"--implementations: there is no {', '.join(sorted(unknown))}, only {', '.join(IMPLEMENTATIONS)}"
        )
    main(args)
