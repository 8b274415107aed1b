"""Kills training runs at random moments and checks that the last one ends as if nothing had happened.

    python tests/chaos.py --kills 50 --processes 1

A run saves every third step, deletes old checkpoints, exports and evaluates, so a kill meets all of these. Each run
starts from what the one before left. When one has finished, its weights, optimizer state and losses must be equal, to
the byte, to those of a run that nobody killed; then a new folder is begun. Prints what was done as JSON.
"""

import argparse
import collections
import contextlib
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import sys
import tempfile
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="pi_jax-chaos-"))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_NUM_CPU_DEVICES"] = "2"

# Imported before the runs are forked, which takes seconds; no device is used before.
from pi_jax import tiny
from pi_jax.evaluate import passkey  # noqa: F401
from pi_jax.train import loop  # noqa: F401
from pi_jax.train.__main__ import main as train

STEPS = 60


def start(folder: pathlib.Path, words: list[str], processes: int) -> list[int]:
    """Starts a run; returns its process numbers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    started = []
    for index in range(processes):
        if pid := os.fork():
            started.append(pid)
            continue
        status = 1
        try:
            log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            if processes > 1:
                os.environ["PI_JAX_COORDINATOR"] = f"127.0.0.1:{port}"
                os.environ["PI_JAX_NUM_PROCESSES"] = f"{processes}"
                os.environ["PI_JAX_PROCESS_ID"] = f"{index}"
            train([*words, "--train.output", str(folder)])
            status = 0
        except SystemExit as exit:
            status = exit.code if isinstance(exit.code, int) else 1
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return started


def finish(pids: list[int]) -> list[int]:
    """Waits for a run; returns its exit statuses."""
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def left(folder: pathlib.Path) -> dict:
    """What a finished run left: checksums of its last checkpoint, its losses, and names of files that must not be."""
    metadata = json.loads((folder / "checkpoints" / str(STEPS) / "_CHECKPOINT_METADATA").read_text())
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [(r["step"], r["loss"]) for r in records if "loss" in r]
    strays = [str(p.relative_to(folder)) for p in folder.rglob("*") if p.name.endswith((".tmp", ".lock", "-tmp"))]
    evaluations = [(r["step"], r["perplexity/256"]) for r in records if "perplexity/256" in r]
    exports = sorted(p.name for p in (folder / "hf").iterdir())
    done = {
        "evaluations": evaluations,
        "exports": exports,
        "result": json.loads((folder / "result.json").read_text())["steps"],
    }
    return done | {"state": metadata["custom_metadata"]["fingerprint"], "losses": losses, "strays": strays}


def main() -> None:
    """Runs the script."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    place = pathlib.Path(tempfile.mkdtemp(prefix="pi_jax-chaos-"))
    if (pid := os.fork()) == 0:
        tiny.tiny_inputs(place / "inputs")
        os._exit(0)
    assert finish([pid]) == [0]
    words = ["--config", str(pathlib.Path(__file__).parents[1] / "configs" / "tiny.py")]
    words += ["--data.sources", str(place / "inputs/tokens"), "--train.init-from", str(place / "inputs/model")]
    words += ["--train.steps", f"{STEPS}", "--checkpoint.every", "3", "--checkpoint.export-hf-every", "20"]
    words += ["--evaluate.data", str(place / "inputs/heldout"), "--evaluate.every", "30", "--logging.every", "1"]
    words += ["--evaluate.windows", "256", "--evaluate.stride", "256", "--logging.no-tensorboard"]
    whole = place / "whole"
    for _ in range(2):  # the second time, with all programs compiled, is the time that a kill falls into
        shutil.rmtree(whole, ignore_errors=True)
        began = time.monotonic()
        statuses = finish(start(whole, words, options.processes))
        seconds = time.monotonic() - began
        assert statuses == [0] * options.processes, whole.with_suffix(".log").read_text()
    expected, found = left(whole), collections.Counter()
    assert not expected["strays"], expected["strays"]
    number = 0
    while found["kills"] < options.kills or found["unfinished"]:
        folder = place / f"run-{number}"
        pids = start(folder, words, options.processes)
        if found["kills"] < options.kills:
            time.sleep(rng.uniform(0, seconds))
            with contextlib.suppress(ProcessLookupError):
                os.kill(rng.choice(pids), signal.SIGKILL)  # one of them; a launcher then kills the others
            time.sleep(0.05)
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
        statuses = finish(pids)
        if -signal.SIGKILL in statuses:
            found["kills"] += 1
            found["unfinished"] = 1
            continue
        assert set(statuses) == {0}, folder.with_suffix(".log").read_text()
        now = left(folder)
        for what in expected:
            assert now[what] == expected[what], f"{folder}: {what}: {now[what]}, not {expected[what]}"
        found["finished"] += 1
        found["unfinished"] = 0
        number += 1
        shutil.rmtree(folder)
    shutil.rmtree(place)
    print(json.dumps({"kills": found["kills"], "finished": found["finished"], "seconds_of_a_run": round(seconds, 1)}))


if __name__ == "__main__":
    main()
