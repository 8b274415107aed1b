"""Evaluation on two processes, as on two hosts: every process finds what one process alone finds."""

import json
import socket
import subprocess
import sys

import numpy as np
import pytest

WORKER = """
import json, sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4 // int(sys.argv[2]))
if int(sys.argv[2]) > 1:
    jax.distributed.initialize(f"127.0.0.1:{sys.argv[3]}", int(sys.argv[2]), int(sys.argv[1]),
                               cluster_detection_method="deactivate")
from types import SimpleNamespace
from pi_jax.parallel import sharding
from pi_jax.config import ComputeConfig, MeshConfig
from pi_jax.convert.open import open_model
from pi_jax.data.tokenizer import load_tokenizer
from pi_jax.evaluate.harness import HarnessModel
from pi_jax.evaluate.perplexity.sliding import score_documents

source = open_model(sys.argv[4])
mesh = sharding.make_mesh(MeshConfig(data=2))
def requests(*arguments):
    return [SimpleNamespace(args=a) for a in arguments]
with jax.set_mesh(mesh):
    model = source.load(ComputeConfig("float32", "float32", "none"), mesh)
    lm = HarnessModel(model, mesh, load_tokenizer(source.files), 64, 128)
    texts = ["the grass is green" * n for n in (1, 2, 3, 5)]
    found = {
        "pairs": lm.loglikelihood(requests(*((t, " and the sky") for t in texts)), disable_tqdm=True),
        "rolling": lm.loglikelihood_rolling(requests(*((t,) for t in texts)), disable_tqdm=True),
        "texts": lm.generate_until(requests(*((t, {"until": ["z"], "max_gen_toks": 6}) for t in texts)), True),
    }
    losses = score_documents(model, [jax.numpy.arange(90) % 250, jax.numpy.arange(33) % 250], 32, 8, mesh)
    found["losses"] = [[float(x) for x in loss[1:]] for loss in losses]
print("RESULT" + json.dumps(found), flush=True)
"""


def _run(model: str, processes: int) -> list[dict]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    commands = [[sys.executable, "-c", WORKER, *map(str, (rank, processes, port, model))] for rank in range(processes)]
    running = [subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for c in commands]
    found = []
    for process in running:
        out, error = process.communicate(timeout=170)
        assert process.returncode == 0, error[-3000:]
        found.append(json.loads(next(x for x in out.splitlines() if x.startswith("RESULT"))[6:]))
    return found


@pytest.mark.slow
def test_two_processes_find_what_one_finds(inputs):
    (alone,), (first, second) = _run(inputs["model"], 1), _run(inputs["model"], 2)
    assert first == second
    assert first["texts"] == alone["texts"] and len(set(alone["texts"])) > 1
    assert [greedy for _, greedy in first["pairs"]] == [greedy for _, greedy in alone["pairs"]]
    for name in ("rolling", "losses"):
        for a, b in zip(first[name], alone[name], strict=True):
            np.testing.assert_allclose(a, b, atol=1e-3)
    np.testing.assert_allclose([x for x, _ in first["pairs"]], [x for x, _ in alone["pairs"]], atol=1e-3)
