"""Who a process is by its launcher's variables, and several processes that train as one."""

import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import yaml

from pi_jax.errors import InputError
from pi_jax.parallel import supervisor, xla_options
from pi_jax.parallel.cluster import Cluster, detect

ROOT = pathlib.Path(__file__).parent.parent
SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "node[007-008,012],other3",
    "SLURM_STEP_NUM_TASKS": "32",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "8(x4)",
}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
TORCHRUN |= {"MASTER_ADDR": "a", "MASTER_PORT": "7"}
EXPLICIT = {"PI_JAX_COORDINATOR": "a:1", "PI_JAX_NUM_PROCESSES": "2", "PI_JAX_PROCESS_ID": "1"}
MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2"}
MPI |= {"OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}


@pytest.mark.parametrize(
    "env, expected",
    [
        ({}, None),
        (EXPLICIT, Cluster("PI_JAX_*", "a:1", 2, 1)),
        (EXPLICIT | TORCHRUN | SLURM, Cluster("PI_JAX_*", "a:1", 2, 1)),
        (EXPLICIT | {"PI_JAX_LOCAL_DEVICE_IDS": "2,3"}, Cluster("PI_JAX_*", "a:1", 2, 1, (2, 3))),
        (TORCHRUN, Cluster("torchrun", "a:7", 4, 3, (1,))),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}, Cluster("torchrun", "a:7", 4, 3)),
        (TORCHRUN | {"WORLD_SIZE": "1", "RANK": "0"}, None),
        (SLURM, Cluster("SLURM", "node007:61441", 32, 9, (1,))),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "5"}, Cluster("SLURM", "node007:61441", 32, 9)),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x32)"}, Cluster("SLURM", "node007:61441", 32, 9)),
        (SLURM | {"SLURM_STEP_NODELIST": "solo"}, Cluster("SLURM", "solo:61441", 32, 9, (1,))),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "1"}, None),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "8"}, None),
        (MPI | {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://h,i:4"}, Cluster("Open MPI", "h:29400", 4, 2, (0,))),
        (MPI | {"MASTER_ADDR": "b"}, Cluster("Open MPI", "b:29400", 4, 2, (0,))),
    ],
)  # fmt: skip
def test_launchers_are_recognised(env, expected):
    assert detect(env) == expected


@pytest.mark.parametrize(
    "nodes, host",
    [
        ("alpha,beta", "alpha"),
        ("linux[1,2]", "linux1"),
        ("d05-[041-042]", "d05-041"),
        ("gpu-a100[3,7-9],cpu[01-02]", "gpu-a1003"),
        ("node[001-002]-ib", "node001-ib"),
        ("rack[0-1]node[1-4]", "rack0node1"),
        ("tux[0-1]x[0-3]y,login", "tux0x0y"),
        ("gpu1.cluster.example", "gpu1.cluster.example"),
    ],
)
def test_the_coordinator_is_the_first_host_of_a_slurm_node_list(nodes, host):
    """As `scontrol show hostnames` expands it."""
    assert detect(SLURM | {"SLURM_STEP_NODELIST": nodes}).coordinator == f"{host}:61441"


def test_mpirun_inside_a_slurm_job_is_open_mpi():
    """On another node of the job, mpirun's helper is itself a SLURM step of one task."""
    ranks = MPI | {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://h:4"}
    helper = SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NODELIST": "node012", "SLURM_STEP_TASKS_PER_NODE": "1"}
    for slurm in (SLURM, helper):
        assert detect(slurm | ranks) == detect(ranks) == Cluster("Open MPI", "h:29400", 4, 2, (0,))


def test_empty_variables_count_as_unset():
    assert detect(SLURM | dict.fromkeys(EXPLICIT | TORCHRUN | MPI, "")) == detect(SLURM)
    assert detect(SLURM | {"SLURM_STEP_TASKS_PER_NODE": "", "SLURM_TASKS_PER_NODE": "1(x32)"}).local_devices is None


@pytest.mark.parametrize(
    "env, message",
    [
        (SLURM | {"SLURM_STEP_NODELIST": "(null)"}, "SLURM_STEP_NODELIST is '\\(null\\)': it must be a list of hosts"),
        (SLURM | {"SLURM_STEP_NODELIST": "[1-2]"}, "SLURM_STEP_NODELIST is"),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "x"}, "SLURM_STEP_TASKS_PER_NODE is 'x'"),
        ({"PI_JAX_NUM_PROCESSES": "2", "PI_JAX_PROCESS_ID": "0"}, "PI_JAX_COORDINATOR is '': it must be HOST:PORT"),
        (EXPLICIT | {"PI_JAX_COORDINATOR": "host"}, "it must be HOST:PORT"),
        ({"PI_JAX_COORDINATOR": "a:1"}, "PI_JAX_NUM_PROCESSES is not set"),
        (EXPLICIT | {"PI_JAX_PROCESS_ID": "2"}, "process 2 of 2: processes are numbered 0 to 1"),
        (EXPLICIT | {"PI_JAX_PROCESS_ID": "x"}, "PI_JAX_PROCESS_ID is 'x': it must be a number"),
        (EXPLICIT | {"PI_JAX_LOCAL_DEVICE_IDS": "a"}, "PI_JAX_LOCAL_DEVICE_IDS is 'a'"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "x"}, "LOCAL_WORLD_SIZE is 'x': it must be a number"),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "x"}, "SLURM_NTASKS is 'x': it must be a number"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR is not set"),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"}, "start pi_jax by `srun`"),
        (MPI, "mpirun -x MASTER_ADDR"),
    ],
)
def test_variables_that_contradict_each_other_are_refused(env, message):
    with pytest.raises(InputError, match=message):
        detect(env)


def test_compiled_programs_are_kept_in_the_users_cache_unless_told_otherwise(monkeypatch, tmp_path):
    ours = jax.config.jax_compilation_cache_dir
    try:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        xla_options.cache_compiled_programs()
        assert jax.config.jax_compilation_cache_dir == ours  # JAX_COMPILATION_CACHE_DIR is set in tests
        monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
        xla_options.cache_compiled_programs()
        assert pathlib.Path(jax.config.jax_compilation_cache_dir).parent == tmp_path / "pi_jax"
    finally:
        jax.config.update("jax_compilation_cache_dir", ours)


def test_unknown_xla_flags_are_left_out(monkeypatch):
    """An XLA that met one would abort."""
    monkeypatch.setattr(xla_options, "_gpu_generation", lambda: 9)
    monkeypatch.setitem(
        xla_options.XLA_SETTINGS, 9, (("--xla_gpu_no_such_flag=1", "--xla_gpu_autotune_level=0"), {"A": "1"})
    )
    env = {"XLA_FLAGS": "--xla_dump_to=x", "A": "mine"}
    xla_options.set_xla_options(env)
    assert env == {"XLA_FLAGS": "--xla_dump_to=x --xla_gpu_autotune_level=0", "A": "mine"}
    for settings in ({"PI_JAX_XLA": "off"}, {"JAX_PLATFORMS": "cpu"}):
        xla_options.set_xla_options(settings)
        assert "XLA_FLAGS" not in settings


def _command(output, *more, steps=4):
    words = ["--train.steps", steps, "--logging.every", 1, "--checkpoint.every", 2, "--train.output", output, *more]
    config = ["--config", ROOT / "configs" / "tiny.py", "--evaluate.data", "--logging.no-tensorboard"]
    return [sys.executable, "-m", "pi_jax.train", *map(str, (*config, *words))]


def _environment(devices, **more):
    kept = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS",)}
    return kept | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(ROOT)} | more


def _run(command, env):
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=170, cwd=ROOT)


def _local(processes, command, devices):
    done = _run([ROOT / "launch" / "local.sh", str(processes), *command], _environment(devices))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Done.") == 1  # process 0 alone speaks
    return done


def _losses(output):
    return [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(tmp_path_factory, inputs):
    """The losses of one process with four devices."""
    output = tmp_path_factory.mktemp("alone") / "run"
    done = _run(_command(output), _environment(4))
    assert done.returncode == 0, done.stderr[-3000:]
    return _losses(output)


@pytest.mark.slow
def test_two_processes_train_as_one(alone, tmp_path):
    _local(2, _command(tmp_path / "run", "--checkpoint.export-hf-every", 4), devices=2)
    np.testing.assert_allclose(_losses(tmp_path / "run"), alone, rtol=1e-5)
    assert (tmp_path / "run" / "hf" / "step-4" / "config.json").exists()


@pytest.mark.slow
def test_four_processes_train_as_one(alone, tmp_path):
    """Also where the heads are split over processes; the test after this one splits the rows."""
    mesh = ("--mesh.fsdp", 1, "--mesh.tensor", 2, "--mesh.data", 2)
    _local(4, _command(tmp_path / "run", *mesh), devices=1)
    np.testing.assert_allclose(_losses(tmp_path / "run"), alone, rtol=1e-5)


@pytest.mark.slow
def test_another_number_of_processes_goes_on_with_the_same_batches(alone, tmp_path):
    """Two processes are preempted; four resume."""
    command = _command(tmp_path / "run", steps=4000)
    running = subprocess.Popen([ROOT / "launch" / "local.sh", "2", *command], env=_environment(2), cwd=ROOT,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip
    for line in running.stdout:
        if " 2/4000 " in line:
            break
    running.send_signal(signal.SIGTERM)
    text = running.communicate(timeout=100)[0]
    assert running.returncode == supervisor.REQUEUE, text[-3000:]
    stopped = len(_losses(tmp_path / "run"))
    assert f"saved at step {stopped}" in text
    done = _local(4, _command(tmp_path / "run", "--mesh.context", 2, steps=stopped + 2), devices=1)
    assert f"Resumed from step {stopped}" in done.stdout
    whole = _run(_command(tmp_path / "whole", steps=stopped + 2), _environment(4))
    assert whole.returncode == 0
    np.testing.assert_allclose(_losses(tmp_path / "run"), _losses(tmp_path / "whole"), rtol=2e-3)


@pytest.mark.slow
def test_two_processes_agree_to_stop_inside_an_evaluation(tmp_path, inputs):
    evaluation = ("--evaluate.data", inputs["heldout"], "--evaluate.every", 2, "--evaluate.windows", 64)
    command = _command(tmp_path / "run", *evaluation, "--evaluate.stride", 1, steps=4000)
    running = subprocess.Popen([ROOT / "launch" / "local.sh", "2", *command], env=_environment(2), cwd=ROOT,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip
    for line in running.stdout:
        if " 2/4000 " in line:
            break
    time.sleep(1)
    running.send_signal(signal.SIGTERM)
    text = running.communicate(timeout=100)[0]
    assert running.returncode == supervisor.REQUEUE and "saved at step 2;" in text, text[-3000:]


def _port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def _slurm(rank, each):
    step = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_STEP_NUM_TASKS": "2"}
    return step | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank % each), "SLURM_STEP_TASKS_PER_NODE": str(each)}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["SLURM, one process a node", "torchrun"])
def test_processes_of_other_launchers_train_as_one(alone, tmp_path, launcher):
    port, processes = _port(), []
    for rank in range(2):
        env = {
            "SLURM, one process a node": _slurm(rank, 1),
            "torchrun": {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
        }[launcher]
        running = subprocess.Popen(_command(tmp_path / "run"), env=_environment(2, **env), cwd=ROOT, text=True,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)  # fmt: skip
        processes.append(running)
    for process in processes:
        error = process.communicate(timeout=170)[1]
        assert process.returncode == 0, error[-3000:]
    np.testing.assert_allclose(_losses(tmp_path / "run"), alone, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("process", [0, 1])
def test_others_that_do_not_come_are_one_sentence(tmp_path, process):
    env = EXPLICIT | {"PI_JAX_COORDINATOR": f"127.0.0.1:{_port()}", "PI_JAX_PROCESS_ID": f"{process}"}
    done = _run(_command(tmp_path / "run"), _environment(1, **env, PI_JAX_TIMEOUT="4"))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: process {process} of 2")
    assert "within 4 s" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_port_that_is_taken_is_one_sentence(tmp_path):
    with socket.create_server(("0.0.0.0", 0)) as taken:
        env = EXPLICIT | {"PI_JAX_COORDINATOR": f"127.0.0.1:{taken.getsockname()[1]}", "PI_JAX_PROCESS_ID": "0"}
        done = _run(_command(tmp_path / "run"), _environment(1, **env, PI_JAX_TIMEOUT="4"))
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: process 0 of 2")


@pytest.mark.slow
def test_processes_with_different_configs_are_refused(tmp_path):
    command = _command(tmp_path / "run")
    odd = ["bash", "-c", '"$@" --data.seed "$PI_JAX_PROCESS_ID"', "-", *command]
    done = _run([ROOT / "launch" / "local.sh", "2", *odd], _environment(2))
    assert done.returncode == 2
    assert "the config of processes [1] differs from that of process 0" in done.stderr


FAILING = """
import os, pathlib, sys
import numpy as np
from jax.experimental import multihost_utils
from pi_jax import atomic, cli
from pi_jax.errors import InputError
from pi_jax.parallel import processes

def fail(here):
    if here == when and os.environ["PI_JAX_PROCESS_ID"] == who:
        raise {"input": InputError, "crash": KeyError}[how]("no such file")

def command():
    fail("before they are connected")
    processes.initialize()
    fail("before they use a device")
    with atomic.lock(pathlib.Path(f"{lock}-{os.getpid()}"), "the run"):
        for step in range(10**6 if when == "while the others wait" else 10):
            multihost_utils.process_allgather(np.array([step]))
            if step == 3:
                fail("while the others wait")
    fail("while the others finish")

how, who, when, lock = sys.argv[1:]
cli.run(command, connect=processes.connect)
"""


def _ended(command, count):
    """The status, stderr, and seconds after the first that ended, of each of several processes."""
    where = {"PI_JAX_COORDINATOR": f"127.0.0.1:{_port()}", "PI_JAX_NUM_PROCESSES": str(count)}
    running = [
        subprocess.Popen(command, env=_environment(1, **where, PI_JAX_PROCESS_ID=str(i)), text=True, cwd=ROOT,
                         stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        for i in range(count)
    ]  # fmt: skip
    try:
        ends, end = {}, time.monotonic() + 150
        while len(ends) < count and time.monotonic() < end:
            ends |= {i: time.monotonic() for i, p in enumerate(running) if i not in ends and p.poll() is not None}
            time.sleep(0.05)
    finally:
        for process in running:
            process.kill()
    return [(p.wait(), p.stderr.read(), ends[i] - min(ends.values())) for i, p in enumerate(running)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "how, who, when",
    [
        ("input", 0, "before they are connected"),
        ("input", 1, "before they are connected"),
        ("input", 1, "before they use a device"),
        ("input", 0, "while the others wait"),
        ("input", 2, "while the others wait"),
        ("crash", 0, "while the others wait"),
        ("crash", 1, "while the others wait"),
        ("input", 0, "while the others finish"),
    ],
)
def test_an_error_on_one_process_ends_all_with_its_status_and_sentence(tmp_path, how, who, when):
    status, message = {"input": (2, "no such file\n"), "crash": (1, "KeyError: 'no such file'\n")}[how]
    command = [sys.executable, "-c", FAILING, how, str(who), when, str(tmp_path / "lock")]
    for process, (code, error, after) in enumerate(_ended(command, 3)):
        assert code == status, error
        assert after < 10
        assert error.endswith(f"error: process {who}: {message}" if process != who else message)
        assert error.count("Traceback") == (process == who and how == "crash")
    assert not list(tmp_path.iterdir())  # no lock is left


def test_a_failure_ends_its_process_when_jax_has_no_store_to_tell_others():
    """The store is not in JAX's public API. Without it, Python's exit would still wait for the other processes."""
    code = "from pi_jax.parallel import processes; processes._watch_others(); raise KeyError('no such file')"
    done = _run([sys.executable, "-c", code], _environment(1))
    assert done.returncode == 1 and done.stderr.endswith("KeyError: 'no such file'\n")


def test_one_process_saves_itself_when_preempted(tmp_path, inputs):
    running = subprocess.Popen(_command(tmp_path / "run", steps=4000), env=_environment(1), cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    for line in running.stdout:
        if " 2/4000 " in line:
            break
    running.send_signal(signal.SIGTERM)
    text = running.communicate(timeout=100)[0]
    assert running.returncode == supervisor.REQUEUE, text[-3000:]
    step = len(_losses(tmp_path / "run"))
    assert f"saved at step {step}" in text and (tmp_path / "run" / "checkpoints" / str(step)).is_dir()


def _children(mark):
    """Process id and environment of all that `local.sh` started with the variable TEST=`mark`."""
    found = {}
    for file in pathlib.Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            variables = file.read_text(errors="replace").split("\0")
            if f"TEST={mark}" in variables and any(v.startswith("PI_JAX_PROCESS_ID=") for v in variables):
                found[int(file.parent.name)] = variables
    return found


@pytest.fixture
def local(tmp_path):
    """Starts `local.sh 2` with a bash script; afterwards nothing may run any more."""
    started = []

    def start(script, **env):
        command = [ROOT / "launch" / "local.sh", "2", "bash", "-c", f"me=$PI_JAX_PROCESS_ID; {script}"]
        env = os.environ | {"TEST": str(tmp_path)} | env
        running = subprocess.Popen(command, env=env, start_new_session=True, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
        started.append(running)
        return running

    yield start
    for running in started:
        running.kill()
    end = time.monotonic() + 20
    while _children(tmp_path) and time.monotonic() < end:
        time.sleep(0.1)
    left = _children(tmp_path)
    for process in left:
        os.kill(process, signal.SIGKILL)
    assert not left


@pytest.mark.parametrize(
    "script, status, message",
    [
        ("exit 0", 0, ""),
        ("exit 75", 75, ""),
        ("if ((me)); then exit 75; fi; sleep 1", 75, ""),
        ("if ((me)); then exit 2; fi; sleep 1000", 2, "local.sh: process 1 ended with status 2\n"),
        ("if ((me)); then exit 75; fi; sleep 1; exit 4", 4, "local.sh: process 0 ended with status 4\n"),
        ("if ((me)); then kill -KILL $$; fi; sleep 1000", 137, "local.sh: process 1 ended with status 137\n"),
        ("if ((me)); then kill -STOP $$; fi; sleep 1; exit 9", 9, "local.sh: process 0 ended with status 9\n"),
        ("if ((me)); then sleep 1000 & sleep 1000; fi; exit 9", 9, "local.sh: process 0 ended with status 9\n"),
    ],
)
def test_the_local_launcher_ends_all_processes_when_one_fails(local, tmp_path, script, status, message):
    """Also those that are stopped, and what they started."""
    running = local(script)
    assert running.communicate(timeout=60)[1] == message
    assert running.returncode == status
    assert not _children(tmp_path)


@pytest.mark.parametrize(
    "script, status",
    [
        ("trap 'exit 75' TERM; echo; while :; do sleep 0.1; done", 75),
        ("trap '' TERM; echo; sleep 1000", 137),
        ("echo; kill -STOP $$", 137),
        ("trap 'exit 75' TERM; if ((me)); then trap '' TERM; fi; echo; while :; do sleep 0.1; done", 137),
    ],
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_the_local_launcher_passes_a_signal_on_and_kills_after_grace(local, tmp_path, script, status, number):
    running = local(script, GRACE="1")
    assert [running.stdout.readline() for _ in range(2)] == ["\n", "\n"]
    running.send_signal(number)
    assert running.wait(timeout=60) == status
    assert not _children(tmp_path)


@pytest.mark.parametrize("whom", ["itself", "its process group"])
def test_the_local_launcher_leaves_nothing_when_it_is_killed(local, whom):
    running = local("trap '' TERM; echo; sleep 1000")
    assert [running.stdout.readline() for _ in range(2)] == ["\n", "\n"]
    (os.kill if whom == "itself" else os.killpg)(running.pid, signal.SIGKILL)  # the fixture looks for what is left


def test_a_second_interrupt_kills_at_once(local):
    running = local("trap 'echo $me' TERM; echo; while :; do sleep 0.1; done")
    assert [running.stdout.readline() for _ in range(2)] == ["\n", "\n"]
    running.send_signal(signal.SIGINT)
    assert {running.stdout.readline() for _ in range(2)} == {"0\n", "1\n"}
    running.send_signal(signal.SIGINT)
    assert running.wait(timeout=60) == 137  # GRACE is 300 seconds


@pytest.mark.slow
def test_a_process_that_is_stopped_ends_all(tmp_path, inputs):
    """The others end when process 0 has not answered for a minute; then the launcher kills it."""
    command = [ROOT / "launch" / "local.sh", "2", *_command(tmp_path / "run", steps=10**6)]
    running = subprocess.Popen(command, env=_environment(1, TEST=str(tmp_path)), cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    for line in running.stdout:
        if " 3/1000000 " in line:
            break
    os.kill(next(i for i, v in _children(tmp_path).items() if "PI_JAX_PROCESS_ID=0" in v), signal.SIGSTOP)
    text = running.communicate(timeout=120)[0]
    assert running.returncode == 134, text[-3000:]
    assert not _children(tmp_path)


@pytest.mark.slow
def test_processes_that_start_at_once_make_the_built_in_inputs_once(tmp_path):
    done = _run([ROOT / "launch" / "local.sh", "2", *_command(tmp_path / "run")], _environment(1, TMPDIR=str(tmp_path)))
    assert done.returncode == 0, done.stderr[-3000:]
    assert len([p for p in tmp_path.iterdir() if p.name.startswith("pi_jax-")]) == 1


def _restarted():
    """Exit status -> whether a restart may cure it, by the table in docs/cluster.md."""
    table = (ROOT / "docs" / "cluster.md").read_text().partition("## Exit statuses")[2].partition("\n## ")[0]
    rows = [line.split("|") for line in table.splitlines() if re.match(r"\| \d", line)]
    return {int(status): row[3].strip() == "yes" for row in rows for status in row[1].split(",")}


@pytest.mark.parametrize("restarts, limit", [(0, ""), (19, ""), (20, ""), (1, "1")])
@pytest.mark.parametrize("status", _restarted())
def test_a_slurm_job_is_requeued_after_what_a_restart_can_cure(tmp_path, status, restarts, limit):
    for name, line in (("srun", f"exit {status}"), ("scontrol", f'echo "$@" > {tmp_path}/requeued')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "pi_jax").mkdir()
    env = os.environ | {"HOME": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    env |= {"SLURM_RESTART_COUNT": str(restarts or ""), "MAX_RESTARTS": limit}
    done = subprocess.run(["bash", ROOT / "launch" / "slurm.sbatch"], env=env, capture_output=True, text=True)
    requeued = _restarted()[status] and restarts < int(limit or 20)
    assert done.returncode == (0 if requeued else status), done.stderr
    assert (tmp_path / "requeued").exists() == requeued
    assert not requeued or (tmp_path / "requeued").read_text() == "requeue 7\n"


def test_a_restart_cures_what_is_not_the_input():
    cured = {supervisor.STALLED, supervisor.REQUEUE, 134, 137, 143}
    assert {status for status, restarted in _restarted().items() if restarted} == cured
    assert set(_restarted()) - cured == {0, 1, 2}


def test_launch_files_are_well_formed():
    for script in ("local.sh", "slurm.sbatch", "tpu_vm.sh"):
        assert subprocess.run(["bash", "-n", ROOT / "launch" / script]).returncode == 0
    account, jobset = yaml.safe_load_all((ROOT / "launch" / "jobset.yaml").read_text())
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    container = job["template"]["spec"]["containers"][0]
    env = {e["name"]: e.get("value") for e in container["env"]}
    assert job["template"]["spec"]["serviceAccountName"] == account["metadata"]["name"]
    assert int(env["PI_JAX_NUM_PROCESSES"]) == job["completions"] == job["parallelism"]
    assert set(env) == {"PI_JAX_COORDINATOR", "PI_JAX_NUM_PROCESSES", "PI_JAX_PROCESS_ID"}
    assert job["template"]["spec"]["restartPolicy"] == "Never"  # a pod failure policy requires it
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule == {
        "action": "FailJob",
        "onExitCodes": {"containerName": container["name"], "operator": "In", "values": [2]},
    }
    assert jobset["spec"]["failurePolicy"]["rules"] == [
        {"name": "badInput", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    ]
    assert subprocess.run([ROOT / "launch" / "local.sh", "0"], capture_output=True).returncode == 2
