"""The training run, top to bottom: `python -m pi_jax.train --config configs/tiny.py`.

Starts from, in this order: the run's own latest checkpoint, `train.init_from`, random weights. The batch of a step is a
pure function of the config and the step, so a resumed run goes on with the text it would have read.
"""

import dataclasses
import functools
import pathlib
import sys
import time
from typing import Any

import jax
import numpy as np

from pi_jax import cli, log, tiny
from pi_jax.checkpoint import Checkpoints
from pi_jax.config import BUILTIN, Config, describe, flatten
from pi_jax.convert.formats import hf
from pi_jax.convert.formats.native import CHECKPOINTS as RUN_CHECKPOINTS
from pi_jax.convert.open import open_model
from pi_jax.data.pipeline import open_pipeline
from pi_jax.errors import InputError
from pi_jax.model import Llama
from pi_jax.parallel import placement, processes, sharding
from pi_jax.train import metrics
from pi_jax.train.abstract import abstract_model, abstract_state, columns
from pi_jax.train.eval_hook import Evaluation
from pi_jax.train.optimizer import learning_rate, make_optimizer
from pi_jax.train.resolve import check, open_architecture, stated_window, with_builtin
from pi_jax.train.run_folder import export, require_folder, write_run_files
from pi_jax.train.step import TrainState, init_train_state, make_step


def train(config: Config, base: Config) -> dict[str, Any]:
    """Runs an experiment.

    Args:
      config: what to run.
      base: the config file's own values, to show the difference.

    Returns:
      The final losses and, where there is held-out text, perplexities.

    Raises:
      InputError: for anything the user can put right, before the first step.
    """
    # ---- Inputs: everything that can be wrong is found here, before any time is spent.
    output = pathlib.Path(config.train.output)
    summary = describe(config, base)
    if BUILTIN in (*config.data.sources, *config.evaluate.data, config.train.init_from):
        config = with_builtin(config, tiny.tiny_inputs())
    model_config, files = open_architecture(config)
    pipeline = open_pipeline(config.data)
    files = files or pipeline.tokenizer_dir
    mesh = sharding.make_mesh(config.mesh)
    check(config, model_config, pipeline, files, mesh)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    evaluation = Evaluation(config, model_config, files)
    require_folder(output)
    processes.require_same("the config", f"{config}")
    processes.require_shared(output)
    log.info(summary)
    log.info(f"Model: {model_config.num_parameters():,} parameters, {model_config.rope}; mesh {dict(mesh.shape)}")
    log.info(f"Data: {pipeline.steps_per_epoch:.1f} steps an epoch, {config.train.steps} steps wanted")
    resumes = {"data": pipeline.fingerprint, "model": f"{model_config}"}

    with (
        jax.set_mesh(mesh),
        jax.default_matmul_precision("float32"),
        processes.preemption_requested() as preemption_requested,
        Checkpoints(output / RUN_CHECKPOINTS, config.checkpoint) as checkpoints,
    ):
        # ---- State.
        state = _start(config, model_config, mesh, optimizer, checkpoints, resumes)
        first = int(state.step)
        if first == config.train.steps and (output / "result.json").exists():
            log.info(f"All {first} steps are done already; the result is in {output}")
            return hf.read_json(output / "result.json")
        if jax.process_index() == 0:
            write_run_files(output, config, model_config, files)
        step_fn = make_step(optimizer)
        rate = learning_rate(config.optimizer, config.train.steps)
        tokens_per_step = config.data.batch_size * config.data.window
        flops_per_step = tokens_per_step * metrics.flops_per_token(model_config, config.data.window)
        peak = metrics.peak_flops(config.logging)

        # ---- Loop.
        rows, names = placement.local_batch_slice(mesh, config.data.batch_size), columns(config.data)
        window_values, since = [], time.monotonic()
        last_log = first
        with metrics.Metrics(output, config.logging, flatten(config), first) as logger:
            if first == 0 and config.evaluate.every:
                evaluation(state.model, mesh, 0, logger)
                since = time.monotonic()
            for index, batch in zip(range(first, config.train.steps), pipeline.iterate(first, rows), strict=False):
                batch = {k: batch[k] for k in names}
                state, values = step_fn(state, placement.put_batch(mesh, batch, rows.start, config.data.batch_size))
                window_values.append(values)
                step = index + 1
                if step == first + 1 or step % config.logging.every == 0 or step == config.train.steps:
                    # The only place that waits for the device.
                    means = {k: float(np.mean([jax.device_get(v[k]) for v in window_values])) for k in values}
                    seconds = time.monotonic() - since
                    done = (step - last_log) / seconds
                    means |= {
                        "learning_rate": float(rate(index)),
                        "tokens_per_second": done * tokens_per_step,
                        "tflops_per_second": done * flops_per_step / 1e12,
                        "tokens": step * tokens_per_step,
                    }
                    if peak:
                        means["mfu"] = done * flops_per_step / peak
                    if not np.isfinite(means["loss"]):
                        raise FloatingPointError(f"the loss is {means['loss']} by step {step}: stopped, nothing saved")
                    logger.write(step, means)
                    left = (config.train.steps - step) / done
                    compiling = "  (with compilation)" if step == first + 1 else ""
                    log.info(metrics.console_line(step, config.train.steps, means, left) + compiling)
                    window_values, since, last_log = [], time.monotonic(), step
                stop = preemption_requested(step) and step < config.train.steps
                checkpoints.save(step, state, resumes, last=stop or step == config.train.steps)
                if stop:
                    log.info(f"Told to stop: saved at step {step}; the same command goes on from here")
                    sys.exit(processes.REQUEUE)
                if config.evaluate.every and step % config.evaluate.every == 0 and step < config.train.steps:
                    jax.block_until_ready(state)  # what the device still owes is training time
                    started = time.monotonic()
                    evaluation(state.model, mesh, step, logger)
                    since += time.monotonic() - started
                if config.checkpoint.export_hf_every and step % config.checkpoint.export_hf_every == 0:
                    before = time.monotonic()
                    if jax.process_count() > 1:  # exported from there, by process 0
                        checkpoints.save(step, state, resumes, last=True)
                    if jax.process_index() == 0:
                        export(output, step, state.model, config.checkpoint.export_dtype, checkpoints)
                    since += time.monotonic() - before  # no part of the training rate

            # ---- Result.
            result = {"steps": config.train.steps, "final": means if first < config.train.steps else None}
            result |= evaluation(state.model, mesh, config.train.steps, logger)
    if jax.process_index() == 0:
        cli.write_json(str(output / "result.json"), result)
    log.info(
        f"Done. Weights, log and result are in {output}; hand them over with\n"
        f"  python -m pi_jax.convert --source {output} --target {output}-hf --format hf"
    )
    return result


def _start(config, model_config, mesh, optimizer, checkpoints, resumes) -> TrainState:
    template = abstract_model(model_config, config.compute, mesh)
    if checkpoints.steps():
        restored = checkpoints.restore(abstract_state(template, optimizer, mesh))
        for reason in restored.skipped:
            log.info(f"Left out checkpoint of {reason}")
        for what, now in resumes.items():
            if restored.metadata.get(what) != now:
                raise InputError(
                    f"{config.train.output} holds checkpoints of a run with other {what} settings: use those of its "
                    "config.json, or give the new run another train.output"
                )
        if restored.step > config.train.steps:
            raise InputError(f"train.steps is {config.train.steps}, but {config.train.output} is at {restored.step}")
        log.info(f"Resumed from step {restored.step}")
        return restored.state
    if config.train.init_from:
        log.info(f"Reading weights from {config.train.init_from}")
        source = open_model(config.train.init_from, window=stated_window(config.model))
        source = dataclasses.replace(source, config=model_config)
        return init_train_state(source.load(config.compute, mesh), optimizer)
    log.info("Starting from random weights")
    places = jax.tree.map(lambda x: x.sharding, template)
    make = jax.jit(functools.partial(Llama, model_config, config.compute), out_shardings=places)
    return init_train_state(make(jax.random.key(config.train.seed)), optimizer)
