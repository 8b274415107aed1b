"""`extend`: prepare, plan, evaluate, fine-tune, evaluate again, report and export, as one command.

Every stage is an ordinary command of pi_jax. Its command line is printed before it runs, so each can be repeated or
changed by hand. A stage whose result exists is skipped: an interrupted `extend` goes on where it stopped.
"""

import dataclasses
import importlib
import math
import os
import pathlib
import shlex
import tempfile
import time
from collections.abc import Iterator
from typing import Literal

from pi_jax import atomic, log
from pi_jax.config import flatten, parse
from pi_jax.convert.folders import read_json
from pi_jax.convert.open import open_model
from pi_jax.data import find
from pi_jax.data.tokenizer import load_tokenizer
from pi_jax.errors import InputError
from pi_jax.evaluate import passkey
from pi_jax.evaluate.perplexity import command as perplexity
from pi_jax.extend import stages, verdict
from pi_jax.extend.stages import Stage, Variant
from pi_jax.parallel.cluster import detect


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extend:
    """Extend the window of a model by Position Interpolation, in one command.

    Tokenizes the text, fine-tunes the model, evaluates it before and after, writes a report (HTML and Markdown) with a
    verdict, and exports a Hugging Face folder. Prints the command of every stage; a stage that is done is skipped."""

    model: str
    """Hugging Face folder, Meta folder, or the folder of a pi_jax run, with its tokenizer."""
    data: tuple[str, ...]
    """Text to fine-tune on: files, folders or globs: .txt, .md, .jsonl, .json (both also .gz or .zst), .parquet."""
    window: str
    """The new window in tokens, such as 32k or 32768."""
    output: str
    """Folder for everything that is made: token store, runs, results, report.html and hf/, the exported model."""
    heldout: tuple[str, ...] = ()
    """Text for perplexity, not used for training. Each path gets its own tables. Empty: passkey retrieval only."""
    steps: int = 1000
    """Steps of fine-tuning."""
    batch_size: int = 8
    """Sequences per step, over all devices. The paper uses 64 (8k) and 128 (16k and 32k)."""
    learning_rate: float = 2e-5
    """Peak learning rate. The paper's, for 7B and 13B; smaller models need more."""
    warmup_steps: int = 20
    evaluations: int = 4
    """How many times the fine-tuned model is evaluated: after equal numbers of steps, the last time after all."""
    compare: tuple[Literal["direct", "yarn"], ...] = ()
    """Baselines to add: 'direct' fine-tunes for as many steps without interpolation; 'yarn' is YaRN without
    fine-tuning."""
    passkey_distances: int = 32
    """Distances of the passkey."""
    passkey_trials: int = 10
    """Keys for each distance."""
    seed: int = 0
    """Seed of the order of the training sequences."""
    topology: str = ""
    """First check that training fits on this hardware, such as h100:8 (`pi-jax plan`; needs the compilers). Empty: no
    check."""
    train_options: str = ""
    """Further options of `pi-jax train`, as one string: --train-options='--compute.dtype float32 --mesh.context 2'."""
    dry_run: bool = False
    """Print the commands and run nothing."""

    def __post_init__(self):
        for name in ("steps", "batch_size", "evaluations", "passkey_distances", "passkey_trials"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} is {getattr(self, name)}: it must be at least 1")
        if self.steps % self.evaluations:
            raise InputError(f"--steps is {self.steps}: it must be a multiple of --evaluations, {self.evaluations}")
        if not self.data:
            raise InputError("--data is empty: it needs at least one text file, folder or glob")


_FIXED = ("rope.", "data.window", "data.sources", "train.", "checkpoint.export_hf_every")
"""Settings of the fine-tuning that follow from the options, so that `train_options` must not change them."""


class Extension:
    """The stages for one set of options, and the models that they compare."""

    def __init__(self, options: Extend):
        """Opens the model.

        Raises:
          InputError: if the model cannot be opened or its window is not shorter than the new one.
        """
        self.options, self.output = options, pathlib.Path(options.output)
        self.window = stages.tokens(options.window)
        self.source = open_model(options.model)
        self.base = self.source.config.max_position_embeddings
        if self.window <= self.base:
            raise InputError(
                f"--window is {self.window}, but {options.model} has a window of {self.base}: choose a longer one"
            )
        self.factor = self.window / self.base
        if int(self.base * self.factor) < self.window:  # rounded down
            self.factor = math.nextafter(self.factor, math.inf)
        try:
            self.train_options = tuple(shlex.split(options.train_options))
        except ValueError as error:
            raise InputError(f"--train-options is {options.train_options!r}: {error}") from None
        self.heldout = {pathlib.Path(path).name.split(".")[0]: path for path in options.heldout}
        if len(self.heldout) < len(options.heldout):
            raise InputError(f"--heldout {' '.join(options.heldout)}: two paths have the same name")

    def check(self) -> None:
        """Checks everything that a later stage would reject; writes nothing.

        Raises:
          InputError: if text is missing or shorter than the window, the passkey prompt does not fit in the window, or
            `train_options` changes a setting that follows from the other options.
          SystemExit: with status 2, if `train_options` has an unknown field.
        """
        find.find_files(self.options.data)
        files, config = self.source.files, self.source.config
        for path in self.heldout.values():
            _, texts = perplexity.read_tokens([path], files, config.vocab_size, self.window)
            perplexity.check_windows(texts, (self.base, self.window), self.stride)
        passkey.require_room(load_tokenizer(files), config.vocab_size, [self.window], "--window")
        with tempfile.TemporaryDirectory() as folder:
            file = pathlib.Path(folder) / "config.py"
            file.write_text(self.config())
            config, base = parse(["--config", str(file), *self.train_options])
        now, before = flatten(config), flatten(base)
        if changed := [name for name in now if now[name] != before[name] and name.startswith(_FIXED)]:
            raise InputError(f"--train-options changes {changed[0]}, which follows from the other options of extend")

    @property
    def stride(self) -> int:
        """Tokens by which the windows of perplexity advance."""
        return max(1, self.base // 4)

    def scaled(self, kind: str) -> tuple[str, ...]:
        """Options that scale the base model to the new window."""
        return "--rope.kind", kind, "--rope.factor", f"{self.factor!r}"

    def before(self) -> list[Variant]:
        """The models that need no fine-tuning."""
        model, window = self.options.model, (self.window,)
        found = [
            Variant("base model", "base", model, (self.base, self.window)),
            Variant("interpolated, not tuned", "untuned", model, window, self.scaled("linear")),
        ]
        if "yarn" in self.options.compare:
            found.append(Variant("YaRN, not tuned", "yarn", model, window, self.scaled("yarn")))
        return found

    def tuned(self, run: str, label: str) -> list[Variant]:
        """The weights of a run at each of its evaluations."""
        every = self.options.steps // self.options.evaluations
        return [
            Variant(f"{label}, {n} steps", f"{run}-{n}", f"{self.output / run}/hf/step-{n}", (self.window,), step=n)
            for n in range(every, self.options.steps + 1, every)
        ]

    @property
    def runs(self) -> dict[str, str]:
        """Labels of the runs of fine-tuning, by their folder."""
        return {"tuned": "interpolated"} | ({"direct": "direct"} if "direct" in self.options.compare else {})

    def result(self, name: str, what: str) -> pathlib.Path:
        """Result file of a variant for a text or 'passkey'."""
        return self.output / "results" / f"{name}-{what}.json"

    def stages(self) -> Iterator[Stage]:
        """All stages, in order."""
        options, output = self.options, self.output
        words = ("--tokenizer", options.model, "--output", f"{output / 'tokens'}", "--window", f"{self.window}")
        yield Stage("Tokenize", ("prepare", "--input", *options.data, *words), output / "tokens" / "manifest.json")
        config = ("--config", f"{output / 'config.py'}", *self.train_options)
        if options.topology:
            plan = output / "results" / "plan.json"
            words = ("plan", *config, "--topology", options.topology, "--output", f"{plan}")
            yield Stage(f"Memory on {options.topology}", words, plan)
        for variant in self.before():
            yield from self.evaluate(variant)
        for run, label in self.runs.items():
            words = ("train", *config)
            if run == "direct":
                words += ("--rope.kind", "default", "--rope.factor", "1", "--train.output", f"{output / run}")
            yield Stage(f"Fine-tune, {label}", words, output / run / "result.json")
            for variant in self.tuned(run, label):
                yield from self.evaluate(variant)
        words = ("convert", "--source", f"{output / 'tuned'}", "--target", f"{output / 'hf'}", "--format", "hf")
        yield Stage("Export", words, output / "hf" / "config.json")

    def evaluate(self, variant: Variant) -> Iterator[Stage]:
        """The evaluations of a model."""
        options = self.options
        for what, path in self.heldout.items():
            file = self.result(variant.name, what)
            words = ("--data", path, "--windows", *map(str, variant.windows), "--stride", f"{self.stride}")
            words += ("--max-tokens", f"{self.window}", "--output", f"{file}")
            command = ("evaluate", "perplexity", "--model", variant.path, *variant.rope, *words)
            yield Stage(f"Perplexity on {what}: {variant.label}", command, file)
        file = self.result(variant.name, "passkey")
        words = ("--lengths", f"{self.window}", "--distances", f"{options.passkey_distances}")
        words += ("--trials", f"{options.passkey_trials}", "--output", f"{file}")
        command = ("evaluate", "passkey", "--model", variant.path, *variant.rope, *words)
        yield Stage(f"Passkey: {variant.label}", command, file)

    def config(self) -> str:
        """The experiment file of the fine-tuning."""
        options, every = self.options, self.options.steps // self.options.evaluations
        return f'''"""Written by `pi-jax extend`: {options.model} from {self.base} to {self.window} tokens."""

from pi_jax.config import CheckpointConfig, Config, DataConfig, LoggingConfig, OptimizerConfig, RopeConfig, TrainConfig


def get_config() -> Config:
    return Config(
        rope=RopeConfig("linear", {self.factor!r}),
        data=DataConfig(
            sources=({f"{self.output / 'tokens'}"!r},),
            window={self.window},
            batch_size={options.batch_size},
            seed={options.seed},
        ),
        optimizer=OptimizerConfig(learning_rate={options.learning_rate!r}, warmup_steps={options.warmup_steps}),
        train=TrainConfig(
            init_from={options.model!r}, output={f"{self.output / 'tuned'}"!r}, steps={options.steps}
        ),
        checkpoint=CheckpointConfig(every={every}, keep=1, export_hf_every={every}),
        logging=LoggingConfig(every={min(10, every)}),
    )
'''


def extend(options: Extend) -> None:
    """Runs the command.

    Raises:
      InputError: if an option is invalid, or the output holds the results of other options.
    """
    extension = Extension(options)
    todo = list(extension.stages())
    if options.dry_run:
        print("\n".join(stage.shown for stage in todo))
        return
    cluster = detect(os.environ)
    if cluster and cluster.processes > 1:
        raise InputError(
            f"extend runs in one process, but was started in {cluster.processes}: run the commands of --dry-run"
        )
    extension.check()
    _open_output(extension)
    began = time.monotonic()
    for number, stage in enumerate(todo, 1):
        heading = f"[{number}/{len(todo)}] {stage.title}"
        if stage.product.exists():
            log.info(f"{heading}: done already")
            continue
        spent = time.monotonic() - began
        log.info(f"\n{heading}  ({spent:.0f} s so far)\n$ {stage.shown}")
        _run(stage)
    log.info("")
    verdict.write(extension)
    log.info(
        f"\nFinished in {time.monotonic() - began:.0f} s.\n  report          {extension.output / 'report.html'}\n"
        f"  model           {extension.output / 'hf'}\nTo go on:\n"
        f"  python -m pi_jax generate --model {extension.output / 'hf'} --prompt 'Once upon a time'\n"
        f"  python -m pi_jax evaluate ruler --model {extension.output / 'hf'} --lengths {extension.window}"
    )


def _open_output(extension: Extension) -> None:
    """Creates the output folder, with the experiment file and the options that it belongs to."""
    record = extension.output / "extend.json"
    now = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(extension.options).items()}
    now = {k: v for k, v in now.items() if k not in ("dry_run", "output")}
    if record.exists():
        before = read_json(record)
        if changed := [k for k in now if before.get(k) != now[k]]:
            lines = ", ".join(f"{k}: {before.get(k)} -> {now[k]}" for k in changed)
            raise InputError(
                f"{extension.output} holds the results of other options ({lines}): restore them, or choose another "
                "--output"
            )
        return
    if extension.output.is_dir() and any(extension.output.iterdir()):
        raise InputError(f"--output {extension.output} is not empty and was not made by extend: choose another folder")
    atomic.write_json(str(record), now)
    with atomic.new_file(extension.output / "config.py") as file:
        file.write_text(extension.config())


def _run(stage: Stage) -> None:
    command, *argv = stage.argv
    module = "pi_jax.prepare" if command == "prepare" else f"pi_jax.{command}.__main__"
    try:
        importlib.import_module(module).main(argv)
    except SystemExit as stopped:
        if stopped.code:  # a plan that does not fit writes its result, too
            stage.product.unlink(missing_ok=True)
        raise
