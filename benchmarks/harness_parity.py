"""lm-evaluation-harness with our adaptor and with its own `hf` model on the same weights and a local task.

    python benchmarks/harness_parity.py --model smollm2/model --text smollm2/text/test/emma.txt --output FILE.json

The task is made of the text: which of four sentences follows a passage. Exits with status 1 if an accuracy differs,
or a log-likelihood by more than 1e-3.
"""

import dataclasses
import datetime
import json
import pathlib
import random
import sys
import tempfile

import tyro

from pi_jax import atomic


@dataclasses.dataclass(frozen=True)
class Parity:
    """Compare the harness's results with our adaptor and with `hf`."""

    model: str
    """Hugging Face folder."""
    text: str
    """A novel."""
    questions: int = 20
    """Each is four log-likelihoods."""
    output: str = ""
    """JSON file for the result."""


def _task(args: Parity, folder: pathlib.Path) -> pathlib.Path:
    """Writes questions and a task file."""
    rng = random.Random(0)
    sentences = [s.replace("\n", " ").strip() for s in pathlib.Path(args.text).read_text().split(". ")]
    sentences = [s for s in sentences if 30 < len(s) < 200]
    with open(folder / "data.jsonl", "w") as file:
        for i in rng.sample(range(len(sentences) - 8), args.questions):
            right = rng.randrange(4)
            options = [f" {s}." for s in rng.sample(sentences, 4)]
            options[right] = f" {sentences[i + 3]}."
            print(
                json.dumps({"passage": ". ".join(sentences[i : i + 3]) + ".", "options": options, "label": right}),
                file=file,
            )
    path = folder / "next_sentence.yaml"
    path.write_text(
        f"task: next_sentence\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/data.jsonl}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: passage\ndoc_to_choice: options\n"
        'doc_to_target: label\ntarget_delimiter: ""\nmetadata: {version: 1}\nmetric_list:\n'
        "  - {metric: acc, aggregation: mean, higher_is_better: true}\n"
        "  - {metric: acc_norm, aggregation: mean, higher_is_better: true}\n"
    )
    return path


def main(args: Parity) -> None:
    """Runs both and compares."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from pi_jax.evaluate.harness import Harness, harness

    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        task = _task(args, folder)
        samples = folder / "samples.json"
        ours = harness(Harness(model=args.model, tasks=(str(task),), samples=str(samples)))["results"]["next_sentence"]
        our_samples = json.loads(samples.read_text())["next_sentence"]
        found = lm_eval.simple_evaluate(
            HFLM(pretrained=args.model, dtype="float32", device="cpu", batch_size=1),
            tasks=["next_sentence"],
            task_manager=TaskManager(include_path=name, include_defaults=False),
        )
    theirs = {m: found["results"]["next_sentence"][f"{m},none"] for m in ("acc", "acc_norm")}
    answers = {s["doc_id"]: s["resps"] for s in found["samples"]["next_sentence"]}
    pairs = [(a[0], b[0]) for s in our_samples for a, b in zip(s["resps"], answers[s["doc_id"]], strict=True)]
    report = {
        "benchmark": "harness_parity",
        "date": datetime.date.today().isoformat(),
        "command": "python " + " ".join(sys.argv),
        "questions": args.questions,
        "accuracies": {"ours": {m: ours[m] for m in theirs}, "hf": theirs},
        "log_likelihoods": len(pairs),
        "largest_difference": max(abs(a[0] - b[0]) for a, b in pairs),
        "greedy_differs": sum(a[1] != b[1] for a, b in pairs),
        "largest_log_likelihood": max(abs(b[0]) for _, b in pairs),
        "lm_eval": lm_eval.__version__,
    }
    print(json.dumps(report, indent=2))
    if args.output:
        atomic.write_json(args.output, report)
    if report["accuracies"]["ours"] != theirs or report["largest_difference"] > 1e-3 or report["greedy_differs"]:
        sys.exit("error: the two differ")


if __name__ == "__main__":
    main(tyro.cli(Parity))
