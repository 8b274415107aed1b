"""What a run says is true: it saves what it says, stops when asked, ends when stuck, and skips what is not finite."""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import jax
import numpy as np
import pytest

from pi_jax import atomic, cli, tiny
from pi_jax.checkpoint import Checkpoints
from pi_jax.checkpoint.manager import Checkpoints as Manager
from pi_jax.config import CheckpointConfig, ComputeConfig, EvaluateConfig
from pi_jax.convert.formats import hf
from pi_jax.convert.model_card import facts_of_run
from pi_jax.convert.open import open_model
from pi_jax.data import trace
from pi_jax.data.pipeline import Pipeline, open_pipeline
from pi_jax.errors import InputError
from pi_jax.model import Llama
from pi_jax.parallel import supervisor
from pi_jax.tiny import tiny_model_config
from pi_jax.train import loop, monitor
from pi_jax.train.run_folder import LOCK
from tests.changes import at_step, with_changes

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def output(config):
    """Folder of the run."""
    return pathlib.Path(config.train.output)


def weights(folder):
    """All weights of a run's last checkpoint, by name."""
    reader = open_model(str(folder)).reader()
    return {tensor.name: np.array(reader.read(tensor)) for tensor in reader.order}


def equal(first, second):
    return first.keys() == second.keys() and all(np.array_equal(first[k], second[k]) for k in first)


def damage(folder, step):
    """Flips a bit in the largest file of a checkpoint."""
    file = max(
        (f for f in (folder / "checkpoints" / str(step)).rglob("*") if f.is_file()), key=lambda f: f.stat().st_size
    )
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def steps_of(folder):
    with Checkpoints(folder / "checkpoints", CheckpointConfig(), writer=False) as checkpoints:
        return checkpoints.steps()


# One writer


def test_a_second_run_in_a_folder_is_refused(config, output):
    output.mkdir()
    with atomic.lock(output / LOCK, "the run"):
        with pytest.raises(InputError, match=f"run is being written by process {os.getpid()} on "):
            loop.train(config)
        assert [p.name for p in output.iterdir()] == [LOCK]
    loop.train(config)
    assert not (output / LOCK).exists()


def test_a_run_does_not_resume_from_another_base_model(config, tmp_path, capsys):
    config = dataclasses.replace(config, model=None)
    for name, seed in (("a", 1), ("b", 2)):
        model = Llama(tiny_model_config(), ComputeConfig(), jax.random.key(seed))
        hf.save(model, str(tmp_path / name), tiny.tiny_inputs()["tokenizer"], "float32")
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    first = with_changes(config, train={"init_from": str(tmp_path / "a"), "steps": 2})
    loop.train(first)
    with pytest.raises(InputError, match=rf"train.init_from: {tmp_path}/a -> {tmp_path}/b"):
        loop.train(with_changes(first, train={"init_from": str(tmp_path / "b"), "steps": 4}))
    loop.train(with_changes(first, train={"init_from": str(tmp_path / "copy"), "steps": 4}))
    assert facts_of_run(first.train.output, 4).base == "a"


# Saved means saved


def test_a_rejected_last_checkpoint_is_written_again(config, output, tmp_path, capsys):
    loop.train(config)
    expected = weights(output)
    damage(output, 6)
    capsys.readouterr()
    loop.train(config)
    said = capsys.readouterr().out
    assert "Skipped a checkpoint: step 6: " in said and f"Moved to {output}/rejected/6" in said
    assert "Resumed from step 4" in said and "Done. " in said
    assert steps_of(output) == [6, 4] and equal(weights(output), expected)


def test_a_stray_folder_with_a_higher_number_stops_nothing(config, output):
    loop.train(with_changes(config, train={"steps": 4}))
    (output / "checkpoints" / "999").mkdir()
    loop.train(config)
    assert steps_of(output) == [6, 4] and (output / "rejected" / "999").exists()


def test_a_checkpoint_that_reads_back_differently_is_saved_again(config, output, monkeypatch, capsys):
    real, damaged = Manager._wait, []

    def wait(self):
        real(self)
        if len(damaged) < most:
            damaged.append(damage(output, 6))

    monkeypatch.setattr(Manager, "_wait", wait)
    most = 1
    loop.train(config)
    said = capsys.readouterr()
    assert "warning: the checkpoint of step 6" in said.err and "saving it again" in said.err and "Done. " in said.out
    assert steps_of(output)[0] == 6 and weights(output)
    shutil.rmtree(output)
    damaged.clear()
    most = 2
    with pytest.raises(InputError, match="the checkpoint of step 6 "):
        loop.train(config)
    assert "Done. " not in capsys.readouterr().out


def test_a_lost_result_is_written_again(config, output):
    config = dataclasses.replace(config, evaluate=EvaluateConfig(data=config.evaluate.data))
    expected = loop.train(config)
    (output / "result.json").write_text('{"final": ')
    (output / "metrics.jsonl").open("ab").write(b'{"step": 3\n\xff\xfe[]\n3\n{"loss": 1}\n')
    again = loop.train(config)
    assert again == expected | {"final": again["final"]}
    assert again["final"]["loss"] == pytest.approx(expected["final"]["loss"])
    assert json.loads((output / "result.json").read_text())["final"]["loss"] == again["final"]["loss"]


def test_what_a_kill_prevented_after_a_checkpoint_is_made_up_for(config, output, inputs):
    evaluation = {"every": 2, "data": (inputs["heldout"],), "windows": (64,), "stride": 64}
    config = with_changes(config, evaluate=evaluation, checkpoint={"every": 2, "export_hf_every": 4})
    loop.train(with_changes(config, train={"steps": 5}))
    lines = (output / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    shutil.rmtree(output / "checkpoints" / "5")  # as if killed in the evaluation and the export after step 4
    shutil.rmtree(output / "hf" / "step-4")
    kept = [line for line, r in zip(lines, records, strict=True) if r["step"] < 4 or (r["step"] == 4 and "loss" in r)]
    (output / "metrics.jsonl").write_text("".join(line + "\n" for line in kept))
    loop.train(config)
    (found,) = (
        r for r in map(json.loads, (output / "metrics.jsonl").open()) if r["step"] == 4 and "perplexity/64" in r
    )
    (before,) = (r for r in records if r["step"] == 4 and "perplexity/64" in r)
    assert found["perplexity/64"] == before["perplexity/64"] and (output / "hf" / "step-4" / "config.json").exists()


# Stops


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_seen_at_most_two_steps_later(config, output, monkeypatch, capsys, number):
    config = with_changes(config, train={"steps": 40}, logging={"every": 200}, checkpoint={"every": 100})
    at_step(monkeypatch, 9, lambda: os.kill(os.getpid(), number))
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stopped:
        loop.train(config)
    assert stopped.value.code == supervisor.REQUEUE and signal.getsignal(number) == before
    (step,) = steps_of(output)
    assert 8 <= step <= 10
    assert f"Stopped: saved at step {step}; run the same command to resume" in capsys.readouterr().out
    assert not (output / LOCK).exists()


def test_a_run_that_was_stopped_ends_as_one_that_was_not(config, tmp_path, monkeypatch):
    whole = with_changes(config, train={"output": str(tmp_path / "whole")})
    result = loop.train(whole)
    with monkeypatch.context() as patched:
        at_step(patched, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit):
            loop.train(config)
    assert loop.train(config)["final"]["loss"] == result["final"]["loss"]
    assert equal(weights(config.train.output), weights(tmp_path / "whole"))


def test_a_signal_during_an_evaluation_stops_it(config, output, inputs, monkeypatch):
    config = with_changes(
        config, train={"steps": 4}, evaluate={"every": 3, "data": (inputs["heldout"],), "windows": (64,), "stride": 8}
    )
    ticks = []

    def tick():
        if supervisor._current and "evaluation after step 3" in supervisor._current._doing:
            ticks.append(len(ticks))
            if len(ticks) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
        real()

    real = supervisor.tick
    monkeypatch.setattr(supervisor, "tick", tick)
    with pytest.raises(SystemExit):
        loop.train(config)
    assert ticks == [0, 1] and steps_of(output)[0] == 3


def test_a_signal_during_an_export_stops_it(config, output, monkeypatch):
    config = with_changes(config, checkpoint={"export_hf_every": 3})
    real = loop.export

    def export(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        real(*args)

    monkeypatch.setattr(loop, "export", export)
    with pytest.raises(SystemExit) as stopped:
        loop.train(config)
    assert stopped.value.code == supervisor.REQUEUE and steps_of(output)[0] == 3
    assert not list((output / "hf").iterdir())


def run_python(code, *words, timeout=120):
    """Runs Python code in a process of its own; returns its status and what it printed on stderr."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, words)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=timeout, cwd=ROOT)
    return done.returncode, done.stderr


SUPERVISED = """
    import os, signal, sys, time
    from pi_jax.parallel import supervisor
    with supervisor.supervise(stall_timeout=float(sys.argv[1]), startup_timeout=float(sys.argv[2])) as supervised:
        if sys.argv[3] != "start-up":
            supervised.step(1)
        for name in sys.argv[4:]:
            os.kill(os.getpid(), getattr(signal, name))
            time.sleep(0.5)
        threads_wait = __import__("threading").Lock()
        threads_wait.acquire()
        threads_wait.acquire()
"""


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ((9, 1, "start-up"), 70, "error: no progress for 1 s in start-up: ended"),
        ((1, 9, "step"), 70, "error: no progress for 1 s in step 2: ended"),
        ((9, 60, "start-up", "SIGTERM"), 75, "SIGTERM before the first step: ended, there was nothing to save"),
        ((9, 60, "step", "SIGINT", "SIGINT"), 130, "Ctrl-C again: ended at once"),
    ],
)
def test_a_run_that_is_stuck_or_has_nothing_to_save_ends_whatever_it_waits_for(words, status, message):
    found, said = run_python(SUPERVISED, *words)
    assert found == status and message in said
    if status == 70:
        assert "Stacks of all threads of process 0:" in said and '"<string>", line ' in said


SUSPENDED = """
    import sys, time
    from pi_jax.parallel import supervisor
    with supervisor.supervise(stall_timeout=6) as supervised:
        supervised.step(1)
        print("ready", flush=True)
        sys.stdin.readline()
        time.sleep(3)
        sys.exit(3)
"""


def test_a_process_that_was_suspended_is_not_stuck():
    command = [sys.executable, "-c", textwrap.dedent(SUSPENDED)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(8)
    process.send_signal(signal.SIGCONT)
    process.communicate("\n", timeout=60)
    assert process.returncode == 3


# Numbers that go wrong


def spoil(monkeypatch, steps):
    """Makes the loss of some steps NaN."""
    real = Pipeline.batch

    def batch(self, index, rows=None):
        found = real(self, index, rows)
        if index + 1 in steps:
            found["loss_weights"] = found["loss_weights"] * np.float32("nan")
        return found

    monkeypatch.setattr(Pipeline, "batch", batch)


def test_a_step_that_is_not_finite_changes_nothing_and_is_reported(config, output, tmp_path, monkeypatch, capsys):
    config = with_changes(config, train={"steps": 3}, checkpoint={"every": 1, "keep": 9}, logging={"every": 3})
    spoil(monkeypatch, {2})
    result = loop.train(config)
    said = capsys.readouterr()
    assert "warning: step 2: loss nan, gradient norm nan: not finite, so the step was skipped; its text: " in said.err
    assert re.search(r"its text: \S+tokens documents? \d+(-\d+)? from token \d+, .* and 5 more", said.err)
    assert "skipped 1" in said.out and result["final"]["skipped_steps"] == 1 and np.isfinite(result["final"]["loss"])
    state = {}
    with Checkpoints(output / "checkpoints", CheckpointConfig(), writer=False) as checkpoints:
        for step in (1, 2, 3):
            state[step] = checkpoints._stored(step)[0]["fingerprint"]
    assert [k for k in state[1] if state[1][k] != state[2][k]] == ["step"]
    assert len([k for k in state[1] if state[2][k] != state[3][k]]) > 10


def test_too_many_steps_that_are_not_finite_end_the_run_with_its_last_good_state(config, output, monkeypatch):
    config = with_changes(config, train={"steps": 9, "max_skipped_steps": 3}, checkpoint={"every": 2})
    spoil(monkeypatch, {3, 5, 6, 7})
    with pytest.raises(
        FloatingPointError, match=r"at step 7: not finite for 3 steps in a row .*weights are those of step 4"
    ):
        loop.train(config)
    assert max(steps_of(output)) == 6


@pytest.fixture
def watched(config):
    return monitor.Monitor(open_pipeline(config.data), 260, 5)


def test_a_spike_is_reported_with_its_text(watched, capsys):
    rng = np.random.default_rng(0)
    for step in range(1, 200):
        watched.observe(step, 3 - step / 200 + rng.normal() * 0.05, 1.0)
    assert not capsys.readouterr().err
    watched.observe(200, 4.5, 9.0)
    assert re.search(
        r"warning: step 200: loss 4.5000 after a median of 2.\d+; its text: \S+ document", capsys.readouterr().err
    )


def test_a_dead_model_is_reported_once(watched, capsys):
    for step in range(1, 50):
        watched.observe(step, np.log(260), 0.0)
    assert (
        capsys.readouterr().err.count("the gradient has been 0 for 20 steps, up to step 20, at a loss of 5.5607") == 1
    )


def test_the_text_of_a_row_is_where_it_is_said_to_be(config):
    pipeline = open_pipeline(with_changes(config, data={"packing": "joined"}).data)
    for step in (0, 300):
        batch = pipeline.batch(step)
        for row, origin in enumerate(pipeline.trace(step)):
            start = int(pipeline.stores[0].offsets[origin.first]) + origin.start
            text = pipeline.stores[0].read(start, start + origin.tokens)
            np.testing.assert_array_equal(batch["tokens"][row], text[:-1])
            assert pipeline.stores[0].offsets[origin.last] < start + origin.tokens


def test_trace_prints_the_text_of_a_step(capsys):
    trace.trace(["--config", str(ROOT / "configs/tiny.py"), "--step", "3", "--row", "1"])
    assert re.fullmatch(r"row 1: \S+ documents? \d+(-\d+)? from token \d+, 257 tokens: '.*'\n", capsys.readouterr().out)
    with pytest.raises(InputError, match="--step is 0: steps are counted from 1"):
        trace.trace(["--config", str(ROOT / "configs/tiny.py"), "--step", "0"])


# One sentence


@pytest.mark.parametrize(
    ("spoiled", "message"),
    [
        (lambda run: run.write_text(""), "run is a file: it must name a folder"),
        (
            lambda run: (run.mkdir(), (run / "checkpoints").write_text("")),
            "checkpoints is a file: it must be a folder of checkpoints",
        ),
        (lambda run: (run.mkdir(), (run / "metrics.jsonl").mkdir()), "metrics.jsonl: Is a directory"),
        (lambda run: (run.mkdir(), (run / "config.json").mkdir()), "config.json cannot be "),
    ],
)
def test_a_folder_that_cannot_be_used_is_one_sentence(config, output, spoiled, message, capsys):
    spoiled(output)
    with pytest.raises(SystemExit) as exit:
        cli.run(lambda: loop.train(config))
    said = capsys.readouterr().err
    assert exit.value.code == 2 and message in said and said.count("\n") == 1


FULL = """
    import resource, sys
    from pi_jax.train.__main__ import main
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
    main(["--config", "configs/tiny.py", "--train.output", sys.argv[1], "--train.steps", "4", "--checkpoint.every", "2",
          "--logging.no-tensorboard"])
"""


def test_a_full_disk_is_one_sentence(tmp_path):
    status, said = run_python(FULL, tmp_path / "run")
    assert status == 2, said
    assert said.splitlines()[-1].startswith("error: a checkpoint cannot be written to ")
    assert said.splitlines()[-1].endswith(": File too large") and len(said.splitlines()) <= 3, said
