"""The training run, top to bottom: `python -m pi_jax.train --config configs/tiny.py`.

Starts from, in this order: the run's own latest checkpoint, `train.init_from`, random weights. The batch of a step is a
pure function of the config and the step, so a resumed run goes on with the text it would have read.
"""

import dataclasses
import functools
import pathlib
import shutil
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from pi_jax import __version__, cli, distributed, metrics, sharding, testing
from pi_jax.checkpoint import Checkpoints
from pi_jax.config import BUILTIN, Config, ModelConfig, describe, extend, flatten, parse
from pi_jax.convert import card, hf
from pi_jax.convert.run import EXPORTS as RUN_EXPORTS
from pi_jax.convert.run import Reader as RunReader
from pi_jax.convert.sources import RUN_CHECKPOINTS, RUN_MODEL, open_model
from pi_jax.data.pipeline import Pipeline, open_pipeline
from pi_jax.errors import InputError
from pi_jax.evaluate.during_training import Evaluation
from pi_jax.loss import batch_loss
from pi_jax.metrics import note
from pi_jax.model import Llama
from pi_jax.optimizer import learning_rate, make_optimizer
from pi_jax.step import (
    TrainState,
    abstract_batch,
    abstract_model,
    abstract_state,
    check_sizes,
    columns,
    first_state,
    make_step,
)


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
        config = _with_builtin(config, testing.tiny_inputs())
    model_config, files = open_architecture(config)
    pipeline = open_pipeline(config.data)
    files = files or pipeline.tokenizer_dir
    mesh = sharding.make_mesh(config.mesh)
    _check(config, model_config, pipeline, files, mesh)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    evaluation = Evaluation(config, model_config, files)
    _require_folder(output)
    distributed.require_same("the config", f"{config}")
    distributed.require_shared(output)
    note(summary)
    note(f"Model: {model_config.num_parameters():,} parameters, {model_config.rope}; mesh {dict(mesh.shape)}")
    note(f"Data: {pipeline.steps_per_epoch:.1f} steps an epoch, {config.train.steps} steps wanted")
    resumes = {"data": pipeline.fingerprint, "model": f"{model_config}"}

    with (
        jax.set_mesh(mesh),
        jax.default_matmul_precision("float32"),
        distributed.told_to_stop() as told_to_stop,
        Checkpoints(output / RUN_CHECKPOINTS, config.checkpoint) as checkpoints,
    ):
        # ---- State.
        state = _start(config, model_config, mesh, optimizer, checkpoints, resumes)
        first = int(state.step)
        if first == config.train.steps and (output / "result.json").exists():
            note(f"All {first} steps are done already; the result is in {output}")
            return hf.read_json(output / "result.json")
        if jax.process_index() == 0:
            _write_run_files(output, config, model_config, files)
        step_fn = make_step(optimizer)
        rate = learning_rate(config.optimizer, config.train.steps)
        tokens_per_step = config.data.batch_size * config.data.window
        flops_per_step = tokens_per_step * metrics.flops_per_token(model_config, config.data.window)
        peak = metrics.peak_flops(config.logging)

        # ---- Loop.
        rows, names = sharding.local_rows(mesh, config.data.batch_size), columns(config.data)
        window_values, since = [], time.monotonic()
        last_log = first
        with metrics.Metrics(output, config.logging, flatten(config), first) as log:
            if first == 0 and config.evaluate.every:
                evaluation(state.model, mesh, 0, log)
                since = time.monotonic()
            for index, batch in zip(range(first, config.train.steps), pipeline.iterate(first, rows), strict=False):
                batch = {k: batch[k] for k in names}
                state, values = step_fn(state, sharding.put_batch(mesh, batch, rows.start, config.data.batch_size))
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
                    log.write(step, means)
                    left = (config.train.steps - step) / done
                    compiling = "  (with compilation)" if step == first + 1 else ""
                    note(metrics.console_line(step, config.train.steps, means, left) + compiling)
                    window_values, since, last_log = [], time.monotonic(), step
                stop = told_to_stop(step) and step < config.train.steps
                checkpoints.save(step, state, resumes, last=stop or step == config.train.steps)
                if stop:
                    note(f"Told to stop: saved at step {step}; the same command goes on from here")
                    sys.exit(distributed.REQUEUE)
                if config.evaluate.every and step % config.evaluate.every == 0 and step < config.train.steps:
                    jax.block_until_ready(state)  # what the device still owes is training time
                    started = time.monotonic()
                    evaluation(state.model, mesh, step, log)
                    since += time.monotonic() - started
                if config.checkpoint.export_hf_every and step % config.checkpoint.export_hf_every == 0:
                    before = time.monotonic()
                    if jax.process_count() > 1:  # exported from there, by process 0
                        checkpoints.save(step, state, resumes, last=True)
                    if jax.process_index() == 0:
                        _export(output, step, state.model, config.checkpoint.export_dtype, checkpoints)
                    since += time.monotonic() - before  # no part of the training rate

            # ---- Result.
            result = {"steps": config.train.steps, "final": means if first < config.train.steps else None}
            result |= evaluation(state.model, mesh, config.train.steps, log)
    if jax.process_index() == 0:
        cli.write_json(str(output / "result.json"), result)
    note(
        f"Done. Weights, log and result are in {output}; hand them over with\n"
        f"  python -m pi_jax.convert --source {output} --target {output}-hf --format hf"
    )
    return result


def _with_builtin(config: Config, paths: dict[str, str]) -> Config:
    """The config with the paths that `builtin:tiny` stands for."""
    sources = tuple(paths["tokens"] if s == BUILTIN else s for s in config.data.sources)
    heldout = tuple(paths["heldout"] if s == BUILTIN else s for s in config.evaluate.data)
    base = paths["model"] if config.train.init_from == BUILTIN else config.train.init_from
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, sources=sources),
        evaluate=dataclasses.replace(config.evaluate, data=heldout),
        train=dataclasses.replace(config.train, init_from=base),
    )


def _require_folder(output: pathlib.Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"train.output {output} cannot be made: {error.strerror}") from None


def open_architecture(config: Config) -> tuple[ModelConfig, str]:
    """The architecture to train, extended as `rope` says, and the folder with its tokenizer ("": that of the data)."""
    model, files = config.model, ""
    if config.train.init_from:
        source = open_model(config.train.init_from, window=_stated_window(model))
        files = source.tokenizer
        if model is not None:
            for field in dataclasses.fields(ModelConfig):
                ours, theirs = getattr(model, field.name), getattr(source.config, field.name)
                if ours != theirs and field.name not in ("bos_token_id", "eos_token_id"):
                    raise InputError(
                        f"model.{field.name} is {ours} but {config.train.init_from} has {theirs}: correct the config, "
                        "or leave `model` out of it"
                    )
        model = source.config
    if model is None:
        raise InputError("neither `model` nor train.init_from is given: say what to train")
    return extend(model, config.rope), files


def _stated_window(model: ModelConfig | None) -> int:
    """The base window as the config states it, for Meta's folders, which do not; 0: it does not say."""
    return model.max_position_embeddings if model else 0


def _check(config: Config, model: ModelConfig, pipeline: Pipeline, files: str, mesh: jax.sharding.Mesh) -> None:
    if pipeline.vocab_size > model.vocab_size:
        raise InputError(
            f"{config.data.sources[0]} was tokenized with {pipeline.vocab_size} tokens, but the model's vocab_size is "
            f"{model.vocab_size}: prepare the text with the model's own tokenizer"
        )
    if config.train.init_from and files and _vocab_hash(files) not in (None, pipeline.vocab_hash):
        raise InputError(
            f"{config.data.sources[0]} was made with another tokenizer than that of {config.train.init_from}: "
            f"prepare the text with --tokenizer {files}"
        )
    if config.rope.kind != "default" and config.data.reach > model.max_position_embeddings:
        need = config.data.reach / model.original_window
        field = "pose_window" if config.data.pose_window else "window"
        raise InputError(
            f"data.{field} is {config.data.reach}, but rope.factor {config.rope.factor:g} stretches the base window of "
            f"{model.original_window} to {model.max_position_embeddings}: the factor must be at least {need:g}"
        )
    check_sizes(config, model, mesh)
    # One loss is traced, not computed: what an attention backend refuses is said before anything is written.
    with jax.set_mesh(mesh):
        jax.eval_shape(batch_loss, abstract_model(model, config.compute, mesh), abstract_batch(config.data, mesh))


def _vocab_hash(files: str) -> str | None:
    from pi_jax.data.prepare import load_tokenizer
    from pi_jax.data.store import TokenizerInfo

    if not any((pathlib.Path(files) / name).is_file() for name in hf.TOKENIZER_FILES):
        return None
    return TokenizerInfo.of(files, load_tokenizer(files).get_vocab()).vocab_hash


def _start(config, model_config, mesh, optimizer, checkpoints, resumes) -> TrainState:
    template = abstract_model(model_config, config.compute, mesh)
    if checkpoints.steps():
        restored = checkpoints.restore(abstract_state(template, optimizer, mesh))
        for reason in restored.skipped:
            note(f"Left out checkpoint of {reason}")
        for what, now in resumes.items():
            if restored.metadata.get(what) != now:
                raise InputError(
                    f"{config.train.output} holds checkpoints of a run with other {what} settings: use those of its "
                    "config.json, or give the new run another train.output"
                )
        if restored.step > config.train.steps:
            raise InputError(f"train.steps is {config.train.steps}, but {config.train.output} is at {restored.step}")
        note(f"Resumed from step {restored.step}")
        return restored.state
    if config.train.init_from:
        note(f"Reading weights from {config.train.init_from}")
        source = open_model(config.train.init_from, window=_stated_window(config.model))
        source = dataclasses.replace(source, config=model_config)
        return first_state(source.load(config.compute, mesh), optimizer)
    note("Starting from random weights")
    places = jax.tree.map(lambda x: x.sharding, template)
    make = jax.jit(functools.partial(Llama, model_config, config.compute), out_shardings=places)
    return first_state(make(jax.random.key(config.train.seed)), optimizer)


def _export(output: pathlib.Path, step: int, model: Llama, dtype: str, checkpoints: Checkpoints) -> None:
    """Writes a Hugging Face folder; one that cannot be written does not end the run."""
    target = output / RUN_EXPORTS / f"step-{step}"
    if target.exists():  # made before the run was resumed from an earlier checkpoint
        shutil.rmtree(target)
    try:
        facts = card.facts_of_run(output, step)
        weights = None if jax.process_count() == 1 else RunReader(output, model.config, step, checkpoints)
        hf.save(model, str(target), str(output / RUN_MODEL), dtype, facts=facts, weights=weights)
        note(f"Exported step {step}: {target}")
    except InputError as error:
        note(f"Not exported at step {step}: {error}")


def _write_run_files(output: pathlib.Path, config: Config, model: ModelConfig, files: str) -> None:
    """What the run was and what an export needs: config.json, model/config.json, model/tokenizer files."""
    flat = {
        k: v if isinstance(v, (int, float, str, bool, list, tuple, type(None))) else f"{v}"
        for k, v in flatten(config).items()
    }
    versions = {"pi_jax": __version__, "jax": jax.__version__, "device": jax.devices()[0].device_kind}
    cli.write_json(str(output / "config.json"), {"config": flat, "versions": versions})
    folder = output / RUN_MODEL
    folder.mkdir(parents=True, exist_ok=True)
    hf.copy_files(files, folder)
    cli.write_json(str(folder / "config.json"), hf.config_dict(model, config.compute.param_dtype))


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""

    def command():
        config, base = parse(argv)
        distributed.initialize()
        train(config, base)

    cli.run(command)


if __name__ == "__main__":
    main()
