"""Runs EleutherAI's lm-evaluation-harness: `python -m pi_jax.evaluate harness`.

The harness requests log-likelihoods and generated text; `HarnessModel` implements its model interface with pi_jax.
Requests are sorted by length, padded to a few lengths and processed in batches. All processes get all requests and run
the same program, with each batch sharded over their devices; process 0 reports the results.
"""

import bisect
import contextlib
import dataclasses
import difflib
import functools
import itertools
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import tyro
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from pi_jax import atomic, cli, log
from pi_jax.data.tokenizer import require_known
from pi_jax.errors import InputError
from pi_jax.evaluate import result
from pi_jax.evaluate.loaded import LoadedModel, ModelOptions
from pi_jax.evaluate.loglikelihood import score_sequences, sequences_per_batch
from pi_jax.generate import Generator, warn_beyond_window
from pi_jax.model import Llama, parameter_axes
from pi_jax.parallel import placement, sharding

TABLE_5 = ("boolq", "piqa", "race_middle", "race", "winogrande")
"""The paper's benchmarks inside the original window. `race` is RACE-H; `race_middle` is our task file for RACE-M."""
TASK_FILES = pathlib.Path(__file__).parent / "tasks"
"""Folder with our task files."""

_CHUNK = 64
"""Number of positions whose logits exist at a time. It is small because answers are short."""
_DEFAULT_NEW_TOKENS = 256  # the default of the harness's own models


class HarnessModel(TemplateLM):
    """Makes a pi_jax model available to lm-evaluation-harness. Tokenization and truncation are as in its `hf` model.

    Args:
      model: model with its parameters on `mesh`, which must be set while the harness runs.
      mesh: mesh; a batch of requests is sharded over its data and fsdp axes.
      tokenizer: tokenizer of transformers.
      max_length: maximum number of tokens of a request; longer requests are truncated on the left.
      batch_tokens: maximum number of tokens per device and batch.
    """

    def __init__(self, model: Llama, mesh: jax.sharding.Mesh, tokenizer: Any, max_length: int, batch_tokens: int):
        super().__init__()
        self._model, self._mesh, self.tokenizer = model, mesh, tokenizer
        self.max_length, self._batch_tokens = max_length, batch_tokens
        self.truncated = 0
        """Number of requests that were truncated."""
        self._generator: Generator | None = None
        # Use few lengths, each compiled once: powers of two and the midpoints between them.
        steps = itertools.chain.from_iterable((2**i, 3 * 2 ** (i - 1)) for i in range(5, 40))
        self._lengths = [*itertools.takewhile(lambda n: n < max_length + 1, steps), max_length + 1]

    @property
    def eot_token_id(self) -> int:
        """Token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """Token that precedes a text without context: BOS, or EOS if there is no BOS."""
        return self.eot_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer, for the harness's cache of requests."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Formats a conversation with the tokenizer's chat template."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Returns token ids. By default, special tokens are added unless the text already starts with BOS."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode(self.prefix_token_id))
        ids = self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        require_known(ids, self.tokenizer, self._model.config.vocab_size, f"the text {string[:40]!r}")
        return ids

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **_: Any) -> list[tuple[float, bool]]:
        """Scores requests of (text, context, continuation).

        Returns:
          For each request, the log-probability of the continuation, and whether greedy decoding produces it.
        """
        sequences, answers = [], [len(continuation) for _, _, continuation in requests]
        for _, context, continuation in requests:
            whole = [*context, *continuation]
            self.truncated += len(whole) > self.max_length + 1
            sequences.append(whole[-(self.max_length + 1) :])
        lengths = list(map(len, sequences))
        results: list[tuple[float, bool] | None] = [None] * len(sequences)
        buckets: dict[int, list[int]] = {}
        for i in sorted(range(len(sequences)), key=lambda i: (lengths[i], sequences[i])):
            buckets.setdefault(self._lengths[bisect.bisect_left(self._lengths, lengths[i])], []).append(i)
        with log.progress(len(sequences), "log-likelihoods", "request", disable_tqdm) as bar:
            for length, members in buckets.items():
                size = self._batch_size(length, len(members))
                for batch in (members[at : at + size] for at in range(0, len(members), size)):
                    tokens = np.zeros((size, length), np.int32)
                    for row, i in zip(tokens, batch, strict=False):
                        row[: lengths[i]] = sequences[i]
                    start = min(lengths[i] - answers[i] for i in batch)
                    stop = max(lengths[i] for i in batch)
                    losses, greedy = score_sequences(self._model, tokens, start, stop, _CHUNK, self._mesh)
                    for place, i in enumerate(batch):
                        scored = slice(lengths[i] - answers[i], lengths[i])
                        total = -float(np.sum(losses[place, scored], dtype=np.float64))
                        results[i] = total, bool(greedy[place, scored].all())
                        if requests[i][0] is not None:
                            self.cache_hook.add_partial("loglikelihood", requests[i][0], results[i])
                    bar.update(len(batch))
        return results

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Returns the log-probabilities of complete texts, computed in disjoint windows of `max_length` tokens."""
        windows = []
        for index, (text,) in enumerate(request.args for request in requests):
            rolling = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            windows += [(index, *make_disjoint_window(pair)) for pair in rolling]
        scores = self._loglikelihood_tokens([(None, *window[1:]) for window in windows], disable_tqdm)
        totals = [0.0] * len(requests)
        for (index, *_), (score, _) in zip(windows, scores, strict=True):
            totals[index] += score
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Generates continuations up to the first stop sequence of the request, or EOS."""
        texts = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(i)
        with log.progress(len(requests), "texts", "request", disable_tqdm) as bar:
            for members in groups.values():
                kwargs = normalize_gen_kwargs(requests[members[0]].args[1], _DEFAULT_NEW_TOKENS)
                room = self.max_length - kwargs["max_gen_toks"]
                if room < 1:
                    raise InputError(
                        f"max_gen_toks of a task is {kwargs['max_gen_toks']}: it must be less than --max-length, "
                        f"{self.max_length}"
                    )
                prompts = {i: self._prompt(requests[i].args[0], room) for i in members}
                members.sort(key=lambda i: len(prompts[i]))
                size = self._batch_size(self.max_length, len(members))
                for batch in (members[at : at + size] for at in range(0, len(members), size)):
                    for i, text in zip(batch, self._generate([prompts[i] for i in batch], kwargs, size), strict=True):
                        texts[i] = text
                        self.cache_hook.add_partial("generate_until", requests[i].args, text)
                    bar.update(len(batch))
        return texts

    def _batch_size(self, length: int, requests: int) -> int:
        """Batch size, a power of two per device, so that tasks of any size share compiled programs."""
        return sequences_per_batch(self._mesh, length, self._batch_tokens, 1 << (requests - 1).bit_length())

    def _prompt(self, text: str, room: int) -> list[int]:
        tokens = self.tok_encode(text) or [self.prefix_token_id]
        self.truncated += len(tokens) > room
        return tokens[-room:]

    def _generate(self, prompts: list[list[int]], kwargs: dict[str, Any], size: int) -> list[str]:
        until = handle_stop_sequences(kwargs["until"], eos=self.tokenizer.decode(self.eot_token_id))
        if self._generator is None:
            self._generator = Generator(self._model, self._mesh, max_length=self.max_length)
        found: list[list[int]] = [[] for _ in prompts]
        going = set(range(len(prompts)))

        def on_token(index: int, token: int) -> None:
            if index not in going:
                return
            found[index].append(token)
            if token == self.eot_token_id or any(stop in self._text(found[index]) for stop in until):
                going.remove(index)
                if not going:
                    raise _AllStopped

        with contextlib.suppress(_AllStopped):
            self._generator(
                prompts + [prompts[0]] * (size - len(prompts)),  # all batches have the same shape
                kwargs["max_gen_toks"],
                temperature=kwargs["temperature"] if kwargs["do_sample"] else 0.0,
                top_p=kwargs.get("top_p", 1.0),
                on_token=on_token,
            )
        return [postprocess_generated_text(self._text(tokens), until, None) for tokens in found]

    def _text(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)


class _AllStopped(Exception):
    """Raised when all texts of a batch have reached a stop sequence, to end the generation early."""


def load_tasks(tasks: Sequence[str], include: str) -> tuple[list[str], Any]:
    """Resolves 'table5' and task files to names of tasks.

    Returns:
      The names, and the harness's task manager for them.

    Raises:
      InputError: if a name is unknown or a file does not exist.
    """
    folders, names = [str(TASK_FILES)], []
    if include:
        if not pathlib.Path(include).is_dir():
            raise InputError(f"--include {include}: there is no such folder")
        folders.append(include)
    for task in tasks:
        file = pathlib.Path(task)
        if file.suffix != ".yaml":
            names += TABLE_5 if task == "table5" else [task]
        elif not file.is_file():
            raise InputError(f"task {task}: there is no such file")
        else:
            folders.append(str(file.parent))
            names.append(_name_in(file))
    only_files = all(task.endswith(".yaml") for task in tasks)
    manager = _manager(tuple(dict.fromkeys(folders)), include_defaults=not only_files)
    for name in names:
        if not manager.match_tasks([name]):
            close = difflib.get_close_matches(name, manager.all_tasks, 3)
            hint = f"did you mean {' or '.join(close)}?" if close else "see lm_eval ls tasks, or pass a task file"
            raise InputError(f"task {name!r} is neither in lm-evaluation-harness nor in --include: {hint}")
    return names, manager


@functools.cache
def _manager(folders: tuple[str, ...], include_defaults: bool) -> Any:
    """Creates a task manager. Reading the harness's own task files takes seconds, so the result is cached."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=list(folders), include_defaults=include_defaults)


def _name_in(file: pathlib.Path) -> str:
    found = re.search(r"^task:\s*(\S+)", file.read_text(), re.MULTILINE)
    if not found:
        raise InputError(f"task {file} has no line 'task: NAME'")
    return found[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Harness(ModelOptions):
    """Run benchmarks of lm-evaluation-harness, for example the paper's Table 5."""

    tasks: tuple[str, ...]
    """Names of tasks, task files (.yaml), or 'table5' for BoolQ, PIQA, RACE-M, RACE-H and WinoGrande."""
    include: str = ""
    """Folder with additional task files."""
    num_fewshot: int | None = None
    """Number of examples before each question; None: the default of the task, usually 0."""
    limit: int | None = None
    """Maximum number of questions per task, for trials; do not report such results. Default: all."""
    max_length: int | None = None
    """Maximum number of tokens of a request; longer requests are truncated on the left. None: the window of the model,
    but at most 8,192."""
    chat_template: bool = False
    """Format requests as a conversation with the tokenizer's chat template."""
    batch_tokens: int = 8192
    """Maximum number of tokens per device and batch. Lower it if memory runs out."""
    samples: str = ""
    """Also write all questions with the model's answers to this JSON file."""

    def __post_init__(self):
        if not self.tasks:
            raise InputError("--tasks is empty: it needs at least one task")
        for name in ("limit", "max_length", "batch_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} is {value}: it must be positive")


def harness(args: Harness) -> dict[str, Any]:
    """Runs the command and returns its result."""
    import lm_eval

    atomic.require_writable(args.output)
    atomic.require_writable(args.samples)
    names, manager = load_tasks(args.tasks, args.include)
    loaded = LoadedModel.for_evaluation(args)
    source, tokenizer = loaded.source, loaded.tokenizer
    if tokenizer.eos_token_id is None:
        raise InputError(f"tokenizer {source.files} has no EOS token, which the harness needs")
    max_length = args.max_length or min(source.config.max_position_embeddings, 8192)
    warn_beyond_window(source.config, max_length)
    # Requests have arbitrary lengths, so the batch, not the sequence, is sharded over the context axis.
    mesh = sharding.for_generation(loaded.mesh)
    with jax.set_mesh(mesh):
        model = placement.put_params(mesh, loaded.weights, parameter_axes(loaded.weights))
    with jax.set_mesh(mesh), jax.default_matmul_precision("float32"):
        lm = HarnessModel(model, mesh, tokenizer, max_length, args.batch_tokens)
        try:
            found = lm_eval.simple_evaluate(
                model=lm,
                tasks=names,
                task_manager=manager,
                num_fewshot=args.num_fewshot,
                limit=args.limit,
                apply_chat_template=args.chat_template,
                log_samples=bool(args.samples),
                bootstrap_iters=1000,
            )
        except (FileNotFoundError, ConnectionError) as error:  # a data set is missing or cannot be downloaded
            reason = f"{error}".splitlines()[0]
            raise InputError(f"the data of {', '.join(names)} cannot be loaded: {reason}") from None
    results = {task: _metrics(values, found["n-samples"].get(task)) for task, values in found["results"].items()}
    report = result.report(
        "harness",
        args.model,
        source.config,
        protocol={
            "lm_eval": lm_eval.__version__,
            "num_fewshot": args.num_fewshot,
            "limit": args.limit,
            "max_length": max_length,
            "truncated_requests": lm.truncated,
            "chat_template": args.chat_template,
            "dtype": args.dtype,
            "task_versions": found["versions"],
        },
        results=results,
    )
    log.info(f"{args.model}: {source.config.rope}, lm_eval {lm_eval.__version__}, {args.dtype}")
    log.info(table(report["results"]))
    result.write(args.output, report)
    if args.samples:
        result.write(args.samples, found["samples"])
    return report


def _metrics(values: dict[str, Any], counted: dict[str, int] | None) -> dict[str, Any]:
    """Renames metrics such as 'acc,none': returns {'acc': 0.5, 'acc_stderr': 0.05, 'questions': 100}."""
    kept = {k: v for k, v in values.items() if isinstance(v, (int, float)) and "," in k}
    found = {k.removesuffix(",none").replace(",none", ""): v for k, v in kept.items()}
    return {**found, "questions": counted["effective"] if counted else None}


def table(results: dict[str, dict[str, Any]]) -> str:
    """Formats results as a table with one line per task and metric."""
    lines = [f"{'task':24} {'questions':>9}  {'metric':12} {'value':>8}"]
    for task, values in results.items():
        for metric, value in values.items():
            if metric == "questions" or metric.endswith("_stderr"):
                continue
            error = values.get(f"{metric}_stderr")
            margin = f" ± {error:.4f}" if isinstance(error, float) and error == error else ""
            lines.append(f"{task:24} {values['questions'] or '':>9}  {metric:12} {value:8.4f}{margin}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command with the arguments of the command line."""
    cli.run(lambda: harness(tyro.cli(Harness, prog="python -m pi_jax.evaluate harness", args=argv)))
