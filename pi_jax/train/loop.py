"""The training run, top to bottom: `python -m pi_jax.train --config configs/tiny.py`.

The run starts from its own latest checkpoint, else from `train.init_from`, else from random weights. The batch is a
pure function of the config and the step, so a resumed run reads the same text as an uninterrupted one.
"""

import collections
import contextlib
import functools
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from pi_jax import atomic, log
from pi_jax.checkpoint import Checkpoints
from pi_jax.config import Config, ModelConfig, ProfileConfig, describe, flatten
from pi_jax.convert.folders import read_json
from pi_jax.errors import InputError
from pi_jax.model import Llama
from pi_jax.parallel import placement, processes, supervisor
from pi_jax.train import metrics
from pi_jax.train.abstract import abstract_model, abstract_state, columns
from pi_jax.train.monitor import Monitor
from pi_jax.train.optimizer import learning_rate
from pi_jax.train.resolve import Experiment, resolve
from pi_jax.train.run_folder import (
    LOCK,
    as_recorded,
    changes,
    checkpoints_folder,
    export,
    export_folder,
    read_config,
    refused_changes,
    require_folder,
    write_run_files,
)
from pi_jax.train.step import TrainState, init_train_state, make_step

_AHEAD = 2
"""Steps that may be dispatched beyond the last one that is known to be finished: a signal is seen in time."""


def train(config: Config, base: Config | None = None) -> dict[str, Any]:
    """Runs an experiment.

    Args:
      config: what to run.
      base: the config file's own values, to report what the command line changed.

    Returns:
      The final losses and, where there is held-out text, perplexities.

    Raises:
      InputError: for anything the user can fix, before the first step.
      FloatingPointError: if the loss or the gradient is not finite in too many steps in a row.
      SystemExit: with status `supervisor.REQUEUE`, if it was stopped by a signal and saved.
    """
    experiment = resolve(config)
    with supervisor.supervise(config.train.stall_timeout, config.train.startup_timeout) as supervised:
        return _supervised(experiment, supervised, base or config)


def _supervised(experiment: Experiment, supervised: supervisor.Supervisor, base: Config) -> dict[str, Any]:
    config = experiment.config
    output = pathlib.Path(config.train.output)
    require_folder(output)
    processes.require_same("the config", f"{experiment.config}")
    processes.require_shared(output)
    model, pipeline, mesh = experiment.model, experiment.pipeline, experiment.mesh
    log.info(describe(config, base))
    log.info(f"Model: {model.num_parameters():,} parameters, {model.rope}; mesh {dict(mesh.shape)}")
    log.info(f"Data: {pipeline.steps_per_epoch:.1f} steps per epoch, {config.train.steps} steps to run")
    _warn_of_untrained_positions(config, model)
    first = jax.process_index() == 0
    with (
        atomic.lock(output / LOCK, f"{output}") if first else contextlib.nullcontext(),
        jax.set_mesh(mesh),
        jax.default_matmul_precision("float32"),
        Checkpoints(checkpoints_folder(output, config), config.checkpoint) as checkpoints,
    ):
        state = _initial_state(experiment, checkpoints)
        if int(state.step) == config.train.steps:
            with contextlib.suppress(InputError):  # there is none, or a damaged one: it is written again
                result = read_json(output / "result.json")
                log.info(f"All {config.train.steps} steps are done already; the result is in {output}")
                return result
        _report_changes(output, experiment.config)
        if first:
            write_run_files(output, experiment.config, model, experiment.tokenizer, int(state.step))
        with metrics.Metrics(output, config.logging, flatten(experiment.config), int(state.step)) as logger:
            result = _run(experiment, state, checkpoints, logger, supervised)
        if first:
            atomic.write_json(output / "result.json", result)
    log.info(
        f"Done. Weights, log and result are in {output}; export the model with\n"
        f"  python -m pi_jax.convert --source {output} --target {output}-hf --format hf"
    )
    return result


def _warn_of_untrained_positions(config: Config, model: ModelConfig) -> None:
    reach, window = config.data.reach, model.max_position_embeddings
    if config.rope.kind != "default" and reach < window:
        log.warn(
            f"Training sequences reach {reach:,} of the window of {window:,} tokens: positions beyond are not trained; "
            f"set data.window or data.pose_window to {window} to train them"
        )


def _report_changes(output: pathlib.Path, config: Config) -> None:
    """Prints what changed since the run was last started, before config.json is replaced."""
    before, now = read_config(output), as_recorded(config)
    changed = [line for part in now for line in changes(before.get(part, {}), now[part])]
    if changed:
        log.info("\n".join(["Changed since the run was last started:", *(f"  {line}" for line in changed)]))


def _initial_state(experiment: Experiment, checkpoints: Checkpoints) -> TrainState:
    """Restores the latest checkpoint, or returns the state at step 0 from the base model or random weights."""
    config, mesh, optimizer = experiment.config, experiment.mesh, experiment.optimizer
    template = abstract_model(experiment.model, config.compute, mesh)
    if checkpoints.steps():
        output = pathlib.Path(config.train.output)
        if changed := refused_changes(experiment.identity, checkpoints.metadata(), config, output):
            raise InputError(
                f"{output} holds checkpoints of a run with other settings ({changed}): restore them, or give the new "
                "run another train.output"
            )
        restored = checkpoints.restore(abstract_state(template, optimizer, mesh))
        for reason in restored.skipped:
            log.info(f"Skipped a checkpoint: {reason}")
        if restored.step > config.train.steps:
            raise InputError(f"train.steps is {config.train.steps}, but {config.train.output} is at {restored.step}")
        if moved := checkpoints.set_aside(restored.step):
            log.info(f"Moved to {', '.join(moved)}: remove it when you have looked at it")
        log.info(f"Resumed from step {restored.step}")
        return restored.state
    if experiment.source:
        log.info(f"Reading weights from {config.train.init_from}")
        return init_train_state(experiment.source.load(config.compute, mesh), optimizer)
    log.info("Starting from random weights")
    shardings = jax.tree.map(lambda x: x.sharding, template)
    make = jax.jit(functools.partial(Llama, experiment.model, config.compute), out_shardings=shardings)
    return init_train_state(make(jax.random.key(config.train.seed)), optimizer)


def _run(
    experiment: Experiment,
    state: TrainState,
    checkpoints: Checkpoints,
    logger: metrics.Metrics,
    supervised: supervisor.Supervisor,
) -> dict[str, Any]:
    """Runs all remaining steps with logging, checkpoints, evaluations and exports."""
    config, mesh, evaluation = experiment.config, experiment.mesh, experiment.evaluation
    output, steps = pathlib.Path(config.train.output), config.train.steps
    step_fn, identity = make_step(experiment.optimizer), experiment.identity
    local, names = placement.local_batch_slice(mesh, config.data.batch_size), columns(config.data)
    step = first = int(state.step)
    profiler = _Profiler(output / "profile", config.profile, first, steps)
    clock = _Clock(experiment, first, supervised)
    means = metrics.last_record(output) if first == steps else None

    def save(last: bool = False) -> None:
        with supervised.phase(f"the checkpoint of step {step}"):
            checkpoints.save(step, state, identity, last=last)

    def evaluate() -> dict[str, Any]:
        jax.block_until_ready(state)  # pending device work counts as training time
        with clock.paused(), supervised.phase(f"the evaluation after step {step}"):
            return evaluation(state.model, mesh, step, logger)

    def export_weights() -> None:
        if jax.process_index() == 0:
            with clock.paused(), supervised.phase(f"the export of step {step}", alone=True):
                export(output, step, state.model, config.checkpoint.export_dtype, checkpoints)

    def evaluation_due() -> bool:
        return bool(config.evaluate.every) and step % config.evaluate.every == 0 and step < steps

    def export_due() -> bool:
        return bool(config.checkpoint.export_hf_every) and step % config.checkpoint.export_hf_every == 0 and step > 0

    try:
        # A run that was killed after a checkpoint may lack what follows at the same step.
        if evaluation_due() and processes.decided_by_first(not metrics.evaluated(output, step)):
            evaluate()
        if export_due() and not export_folder(output, step).exists():
            export_weights()
        for index, batch in zip(range(first, steps), experiment.pipeline.iterate(first, local), strict=False):
            batch = placement.put_batch(mesh, {k: batch[k] for k in names}, local.start, config.data.batch_size)
            with profiler.step(index + 1, state), jax.transfer_guard("disallow"):  # a transfer would stall every step
                state, values = step_fn(state, batch)
            step = index + 1
            profiler.after(step, state)
            clock.add(step, values)
            if step == first + 1 or step % config.logging.every == 0 or step == steps:
                means = clock.means(step)
                logger.write(step, means)
                compiling = "  (with compilation)" if step == first + 1 else ""
                log.info(metrics.console_line(step, steps, means, clock.seconds_left(step)) + compiling)
            if step == steps or step % config.checkpoint.every == 0:
                clock.drain()  # a step that ends the run is not saved
                save(last=step == steps)
            if evaluation_due():
                evaluate()
            if export_due():
                if jax.process_count() > 1:  # process 0 exports from the checkpoint
                    save(last=True)
                export_weights()
        return {"steps": steps, "final": means, **evaluate()}
    except supervisor.Stop:
        clock.drain()
        if clock.has_values:
            logger.write(step, clock.means(step))
        if step > first or checkpoints.steps():
            save(last=True)
            log.info(f"Stopped: saved at step {step}; run the same command to resume")
        else:
            log.info("Stopped before the first step; run the same command to start again")
        sys.exit(supervisor.REQUEUE)


class _Profiler:
    """Traces the steps of `profile.steps`, on process 0."""

    def __init__(self, folder: pathlib.Path, config: ProfileConfig, done: int, steps: int):
        self._folder, self._running = folder, False
        self._first, last = config.bounds
        self._last = min(last, steps)
        if config.steps and not done < self._first <= steps:
            log.warn(
                f"profile.steps is {config.steps!r}, but this run has the steps {done + 1} to {steps}: nothing is "
                "traced; FIRST must be one of them"
            )

    def step(self, step: int, state: TrainState) -> contextlib.AbstractContextManager:
        """Marks a step in the trace; begins the trace with its first step."""
        if step == self._first and jax.process_index() == 0:
            jax.block_until_ready(state)
            jax.profiler.start_trace(self._folder)
            self._running = True
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def after(self, step: int, state: TrainState) -> None:
        """Ends the trace after its last step."""
        if self._running and step == self._last:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            self._running = False
            log.info(f"Profile of steps {self._first} to {step}: {self._folder}")


class _Clock:
    """Waits for the device, so that it is at most two steps behind; averages what is logged, and measures throughput.

    Evaluations and exports do not count.
    """

    def __init__(self, experiment: Experiment, first: int, supervised: supervisor.Supervisor):
        config = experiment.config
        self._steps, self._rate = config.train.steps, learning_rate(config.optimizer, config.train.steps)
        self._tokens = config.data.batch_size * config.data.window
        self._flops = self._tokens * metrics.flops_per_token(experiment.model, config.data.window)
        self._peak = metrics.peak_flops(config.logging)
        self._monitor = Monitor(experiment.pipeline, experiment.model.vocab_size, config.train.max_skipped_steps)
        self._supervised = supervised
        self._pending: collections.deque[tuple[int, dict[str, jax.Array]]] = collections.deque()
        self._values: list[dict[str, np.ndarray]] = []
        self._since, self._last = time.monotonic(), first
        self._per_second = float("nan")

    def add(self, step: int, values: dict[str, jax.Array]) -> None:
        """Takes the values of a step that was just dispatched; waits for the step two before it.

        Raises:
          FloatingPointError: see `Monitor`.
          supervisor.Stop: if the run was asked to stop.
        """
        self._pending.append((step, values))
        while len(self._pending) > _AHEAD:
            self._take()

    def drain(self) -> None:
        """Waits for all steps. Raises the same."""
        while self._pending:
            self._take()

    @property
    def has_values(self) -> bool:
        """Whether there are values that `means` has not returned."""
        return bool(self._values)

    def _take(self) -> None:
        step, values = self._pending.popleft()
        found = jax.device_get(values)
        self._values.append(found)
        self._monitor.observe(step, float(found["loss"]), float(found["grad_norm"]))
        self._supervised.step(step)

    def means(self, step: int) -> dict[str, float]:
        """Returns what is logged at a step: means since the last call, and throughput. Waits for the device."""
        self.drain()
        finite = [v for v in self._values if np.isfinite(v["loss"]) and np.isfinite(v["grad_norm"])]
        means = {k: float(np.mean([v[k] for v in finite or self._values])) for k in self._values[0]}
        means["skipped_steps"] = len(self._values) - len(finite)
        self._per_second = (step - self._last) / (time.monotonic() - self._since)
        means |= {
            "learning_rate": float(self._rate(step - 1)),
            "tokens_per_second": self._per_second * self._tokens,
            "tflops_per_second": self._per_second * self._flops / 1e12,
            "tokens": step * self._tokens,
        }
        if self._peak:
            means["mfu"] = self._per_second * self._flops / self._peak
        self._values, self._since, self._last = [], time.monotonic(), step
        return means

    def seconds_left(self, step: int) -> float:
        """Estimated time to the last step at the current throughput."""
        return (self._steps - step) / self._per_second

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time spent inside from the throughput."""
        started = time.monotonic()
        yield
        self._since += time.monotonic() - started
