"""`launch/slurm.sbatch` under SLURM itself, on a cluster of this one machine (Debian: `apt install slurm-wlm`)."""

import getpass
import pathlib
import shutil
import socket
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parent.parent
HOST = socket.gethostname().partition(".")[0]
CONFIGURATION = f"""
ClusterName=test
SlurmctldHost={HOST}(127.0.0.1)
SlurmUser={getpass.getuser()}
SlurmdUser={getpass.getuser()}
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
ProctrackType=proctrack/linuxproc
SelectType=select/linear
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=10
NodeName={HOST} NodeAddr=127.0.0.1 CPUs=2
PartitionName=gpu Nodes={HOST} Default=YES
"""
CONFIG = """
import dataclasses, pathlib
from pi_jax.config import load_config
config = load_config({tiny!r})
def get_config():
    steps = int(pathlib.Path({steps!r}).read_text())
    return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps))
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (shutil.which("slurmctld") and shutil.which("slurmd")), reason="SLURM is not installed"),
]


def _port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Submits `slurm.sbatch` with two processes; returns the job's number and the file of its output."""
    folder = tmp_path / "slurm"
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    paths = {f"{daemon}LogFile": f"{daemon}.log" for daemon in ("Slurmctld", "Slurmd")}
    paths |= {f"{daemon}PidFile": f"{daemon}.pid" for daemon in ("Slurmctld", "Slurmd")}
    paths |= {"StateSaveLocation": "state", "SlurmdSpoolDir": "spool"}
    lines = [f"{key}={folder / name}" for key, name in paths.items()]
    lines += [f"SlurmctldPort={_port()}", f"SlurmdPort={_port()}"]
    (folder / "slurm.conf").write_text(CONFIGURATION + "\n".join(lines) + "\n")
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))

    home = tmp_path / "home" / "pi_jax"
    (home / ".venv" / "bin").mkdir(parents=True)
    (home / ".venv" / "bin" / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (home / ".venv" / "bin" / "python").chmod(0o755)
    for key, value in (("HOME", home.parent), ("PYTHONPATH", ROOT), ("JAX_PLATFORMS", "cpu")):
        monkeypatch.setenv(key, str(value))
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    monkeypatch.delenv("XLA_FLAGS", raising=False)

    def submit(*words, options=()):
        command = ["sbatch", "--parsable", "--nodes=1", "--ntasks-per-node=2", "--cpus-per-task=1", "--gres=none"]
        command += [f"--output={folder}/job.out", *options, str(ROOT / "launch" / "slurm.sbatch"), *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip(), folder / "job.out"

    daemons = [subprocess.Popen([shutil.which("slurmctld"), "-D"], stderr=subprocess.DEVNULL)]
    daemons += [subprocess.Popen([shutil.which("slurmd"), "-D", "-N", HOST], stderr=subprocess.DEVNULL)]
    try:
        _wait("the node is idle", lambda: "idle" in _out("sinfo", "--noheader"), 60)
        yield submit
    finally:
        subprocess.run(["scancel", "--full", "--signal=KILL", "--user", getpass.getuser()], capture_output=True)
        subprocess.run(["scancel", "--user", getpass.getuser()], capture_output=True)
        for daemon in reversed(daemons):
            time.sleep(1)
            daemon.terminate()
            daemon.wait(30)


def _out(*command):
    return subprocess.run(command, capture_output=True, text=True).stdout


def _wait(what, condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.5)


def _text(file):
    return file.read_text() if file.exists() else ""


def _job(number):
    return dict(word.split("=", 1) for word in _out("scontrol", "show", "job", number).split() if "=" in word)


def test_a_job_saves_before_its_time_limit_is_requeued_resumes_and_finishes(slurm, tmp_path, monkeypatch):
    steps, output = tmp_path / "steps", tmp_path / "run"
    steps.write_text("1000000")
    (tmp_path / "config.py").write_text(CONFIG.format(tiny=str(ROOT / "configs" / "tiny.py"), steps=str(steps)))
    monkeypatch.setenv("CONFIG", str(tmp_path / "config.py"))
    words = ["--train.output", output, "--logging.every", 1, "--logging.no-tensorboard", "--evaluate.data"]
    job, text = slurm(*words, options=["--time=00:03:00", "--signal=TERM@110"])
    _wait("preempted", lambda: "status 75 after" in _text(text) or _job(job)["JobState"] == "FAILED", 200)
    assert "status 75 after" in _text(text), _text(text)[-3000:]
    stopped = len((output / "metrics.jsonl").read_text().splitlines())
    steps.write_text(str(stopped + 5))
    _wait("finished", lambda: _job(job)["JobState"] == "COMPLETED", 200)
    assert f"Resumed from step {stopped}" in text.read_text()
    assert len((output / "metrics.jsonl").read_text().splitlines()) == stopped + 5
    assert int(_job(job)["Restarts"]) >= 1


def test_a_job_with_bad_input_is_not_requeued(slurm, monkeypatch):
    monkeypatch.setenv("CONFIG", "missing.py")
    job, text = slurm()
    _wait("failed", lambda: _job(job)["JobState"] == "FAILED", 100)
    assert _job(job)["ExitCode"] == "2:0" and _job(job)["Restarts"] == "0"
    assert "error: " in text.read_text() and "Traceback" not in text.read_text()
