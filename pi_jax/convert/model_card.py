"""Writes the model card: how the model was trained, its perplexity, and how to serve it at its extended window."""

import dataclasses
import pathlib
from typing import Any

from pi_jax.config import ModelConfig
from pi_jax.convert.folders import EARLIER, read_json
from pi_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Facts:
    """Facts about a model that its config does not contain. A field keeps its default if the fact is unknown."""

    base: str = ""
    """Name of the base model."""
    steps: int = 0
    """Fine-tuning steps."""
    window: int = 0
    """Sequence length in training, in tokens; with PoSE, the window that the positions cover."""
    batch: int = 0
    """Sequences per step."""
    pose: bool = False
    """Whether the positions of shorter sequences were spread over the window (PoSE)."""
    learning_rate: float = 0.0
    data: tuple[str, ...] = ()
    """Names of the training data sets."""
    perplexity: tuple[dict[str, Any], ...] = ()
    """Results of `evaluate perplexity`, one per window."""


def facts_of_run(folder: Any, step: int) -> Facts:
    """Reads the facts from a run's config.json and, if the run is finished, its result.json.

    Raises:
      InputError: if a value is of another type than a run writes.
    """
    path, result = pathlib.Path(folder) / "config.json", pathlib.Path(folder) / "result.json"
    try:
        config = read_json(path)["config"]
    except (InputError, KeyError):
        return Facts()  # a converted checkpoint, not a run
    done = read_json(result) if result.is_file() else {}
    try:
        began = read_json(pathlib.Path(folder) / EARLIER / "1.json")["config"]  # resumed with another path to its base
    except (InputError, KeyError):
        began = config
    try:
        facts = Facts(
            base=pathlib.PurePath(str(began.get("train.init_from") or "")).name,
            steps=step,
            window=config.get("data.pose_window") or config.get("data.window", 0),
            batch=config.get("data.batch_size", 0),
            pose=bool(config.get("data.pose_window")),
            learning_rate=config.get("optimizer.learning_rate", 0.0),
            data=tuple(pathlib.PurePath(str(source)).name for source in config.get("data.sources", ())),
        )
        _tuning(facts)
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(f"{path} has a value of the wrong type: {error}") from None
    if done.get("steps") != step:
        return facts
    try:
        facts = dataclasses.replace(facts, perplexity=tuple(done.get("perplexity", ())))
        _measured(facts)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{result} has perplexities that are not a run's: {error}") from None
    return facts


def text(config: ModelConfig, dtype: str, facts: Facts) -> str:
    """Returns the text of the model card, the README.md of an exported folder."""
    window, original = config.max_position_embeddings, config.original_window
    rows = [
        ("base model", facts.base),
        ("method", _method(config)),
        ("window", f"{window:,} tokens" + (f" (originally {original:,})" if original != window else "")),
        ("parameters", f"{config.num_parameters():,}, {dtype}"),
        ("fine-tuning", _tuning(facts)),
        ("data", ", ".join(facts.data)),
    ]
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    lines += [
        "tags:",
        "- llama",
        "- long-context",
        "- pi_jax",
        "---",
        "",
        f"# {facts.base or 'Model'}, {window:,} tokens",
        "",
    ]
    lines += ["| | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in rows if value), ""]
    return "\n".join([*lines, *_measured(facts), *_serving(config), ""])


def _method(config: ModelConfig) -> str:
    scaling = config.rope
    theta = f"theta {scaling.theta:g}"
    if scaling.kind == "default":
        return f"RoPE as trained, {theta}"
    name = {"linear": "Position Interpolation (linear)"}.get(scaling.kind, scaling.kind)
    return f"{name}, factor {scaling.factor:g}, {theta}"


def _tuning(facts: Facts) -> str:
    if not facts.steps:
        return ""
    tokens = f"{facts.steps:,} steps of {facts.batch} sequences, learning rate {facts.learning_rate:g}"
    reach = f"{'positions spread over (PoSE)' if facts.pose else 'sequences of'} {facts.window:,} tokens"
    return f"{tokens}; {reach}"


def _measured(facts: Facts) -> list[str]:
    if not facts.perplexity:
        return []
    return [
        "## Measured",
        "",
        "Perplexity on held-out text. Each token is predicted from at least window - stride preceding tokens:",
        "",
        "| window | stride | tokens | perplexity |",
        "| ---: | ---: | ---: | ---: |",
        *(
            f"| {row['window']:,} | {row.get('stride', '')} | {row.get('tokens', 0):,} | {row['perplexity']:.2f} |"
            for row in facts.perplexity
        ),
        "",
    ]


def _serving(config: ModelConfig) -> list[str]:
    window, original = config.max_position_embeddings, config.original_window
    if config.rope.kind == "dynamic":
        return [
            "## Serving",
            "",
            f"Beyond {original:,} tokens, use transformers only:",
            "",
            "    # transformers 4 or 5; replace MODEL with the path of this folder",
            '    model = transformers.AutoModelForCausalLM.from_pretrained("MODEL")',
            "",
            "The frequencies of dynamic scaling depend on the length of the text. llama.cpp ignores this scaling, vLLM "
            f"has rotations for the first {original:,} positions only, and SGLang uses the frequencies of the full "
            f"window at every length. Up to {original:,} tokens the model is not scaled, and llama.cpp and vLLM serve "
            "it as it is. To serve a longer window, extend the model with linear or yarn scaling.",
        ]
    return [
        "## Serving at the full window",
        "",
        "Replace `MODEL` with the path of this folder. `config.json` contains the RoPE scaling; the flags state the "
        "window, which the servers would otherwise guess.",
        "",
        "    # transformers 4 or 5",
        '    model = transformers.AutoModelForCausalLM.from_pretrained("MODEL")',
        "",
        f"    vllm serve MODEL --max-model-len {window}",
        "",
        f"    python -m sglang.launch_server --model-path MODEL --context-length {window}",
        "",
        "    python convert_hf_to_gguf.py MODEL --outfile MODEL.gguf      # from llama.cpp",
        f"    llama-server --model MODEL.gguf --ctx-size {window}",
    ]
