"""The harness's adaptor against the harness's own `hf` model on the same weights."""

import json

import jax
import numpy as np
import pytest

from pi_jax.config import ComputeConfig, RopeConfig, extend
from pi_jax.errors import InputError
from pi_jax.evaluate import __main__ as evaluate
from pi_jax.evaluate import harness
from pi_jax.model import Llama
from pi_jax.tiny import tiny_model_config

TASKS = {
    "choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: options
doc_to_target: label
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true},
              {metric: acc_norm, aggregation: mean, higher_is_better: true}]
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}} {{options}}"
metric_list: [{metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]
""",
    "free": """
output_type: generate_until
doc_to_text: "x{{question}}"
doc_to_target: "{{options[0]}}"
generation_kwargs: {until: ["STOPS"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, inputs, mesh):
    """Interpolated by 2, with weights large enough that answers differ."""
    from pi_jax.convert.formats import hf

    folder = tmp_path_factory.mktemp("model") / "hf"
    config = extend(tiny_model_config(), RopeConfig("linear", 2.0))
    with jax.set_mesh(mesh):
        model = Llama(config, ComputeConfig(dtype="float32"), jax.random.key(0))
        model = jax.tree.map(lambda x: 6 * x if x.ndim > 2 else x, model)
        hf.save(model, str(folder), inputs["tokenizer"])
    return str(folder)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Task files; contexts of unequal length, some longer than the window, one empty."""
    folder = tmp_path_factory.mktemp("tasks")
    rng = np.random.default_rng(0)
    letters = list("abcdefghij klmno")
    with open(folder / "data.jsonl", "w") as file:
        for i in range(16):
            question = "".join(rng.choice(letters, rng.integers(1, 200))).strip() if i else ""
            options = [" " + "".join(rng.choice(letters, rng.integers(1, 9))).strip() + "x" for _ in range(4)]
            print(json.dumps({"question": question, "options": options, "label": i % 4}), file=file)
    for name, body in TASKS.items():
        head = f"task: pi_{name}\ndataset_path: json\ntest_split: test\nmetadata: {{version: 1}}\n"
        data = f"dataset_kwargs: {{data_files: {{test: {folder}/data.jsonl}}}}"
        (folder / f"{name}.yaml").write_text(head + data + body.replace("STOPS", "b"))
    return folder


@pytest.fixture(scope="module")
def theirs(model_folder, tasks):
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    lm = HFLM(pretrained=model_folder, dtype="float32", device="cpu", batch_size=1)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return lm_eval.simple_evaluate(lm, tasks=[f"pi_{n}" for n in TASKS], task_manager=manager, bootstrap_iters=0)


@pytest.fixture(scope="module")
def ours(model_folder, tasks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ours")
    files = [str(tasks / f"{n}.yaml") for n in TASKS]
    evaluate.main(
        ["harness", "--model", model_folder, "--tasks", *files, "--batch-tokens", "384"]
        + ["--output", str(folder / "result.json"), "--samples", str(folder / "samples.json")]
    )
    return [json.loads((folder / f"{n}.json").read_text()) for n in ("result", "samples")]


@pytest.mark.parametrize("name", TASKS)
def test_metrics_and_answers_equal_those_of_hf(ours, theirs, name):
    result, samples = ours
    task = f"pi_{name}"
    expected = {k.split(",")[0]: v for k, v in theirs["results"][task].items() if k.endswith(",none")}
    for metric in [m for m in expected if not m.endswith("stderr")]:
        tolerance = 0 if metric in ("acc", "acc_norm", "exact_match") else 1e-5
        np.testing.assert_allclose(result["results"][task][metric], expected[metric], rtol=tolerance)
    assert result["results"][task]["questions"] == 16
    by_id = {s["doc_id"]: s for s in theirs["samples"][task]}
    assert len(samples[task]) == len(by_id) == 16
    for sample in samples[task]:
        for a, b in zip(sample["resps"], by_id[sample["doc_id"]]["resps"], strict=True):
            if name == "free":
                assert a == b
            elif name == "rolling":
                assert abs(a[0] - b[0]) < 1e-3
            else:
                assert abs(a[0][0] - b[0][0]) < 1e-3 and a[0][1] == b[0][1]


def test_the_comparison_could_fail(ours, theirs):
    """Requests were truncated, answers differ, some greedy answers were hit and texts stopped early."""
    result, samples = ours
    assert result["protocol"]["truncated_requests"] > 5
    assert 0 < result["results"]["pi_choice"]["acc"] < 1
    texts = [s["resps"][0][0] for s in samples["pi_free"]]
    assert len(set(texts)) > 4 and not any("b" in t for t in texts)


def test_a_mesh_gives_the_same(ours, model_folder, tasks, tmp_path):
    files = [str(tasks / f"{n}.yaml") for n in ("choice", "free")]
    out = tmp_path / "result.json"
    words = ["--tasks", *files, "--mesh.fsdp", "2", "--mesh.tensor", "2", "--mesh.context", "2", "--output", str(out)]
    evaluate.main(["harness", "--model", model_folder, *words])
    found = json.loads(out.read_text())["results"]
    assert found == {task: ours[0]["results"][task] for task in ("pi_choice", "pi_free")}


def test_race_middle_has_the_form_of_race(tmp_path):
    """Prompts of our task file equal those of the harness's `race` on the same passages."""
    import importlib.util
    import pathlib

    import lm_eval.tasks

    rows = [
        {
            "example_id": "middle1.txt",
            "article": "A b.",
            "question": "Who is  _  .",
            "answer": "B",
            "options": list("wxyz"),
        },
        {"example_id": "middle1.txt", "article": "A b.", "question": "Why?", "answer": "A", "options": list("efgh")},
        {"example_id": "middle1.txt", "article": "A b.", "question": "Where?", "answer": "D", "options": list("abcd")},
        {"example_id": "middle2.txt", "article": "C.", "question": "When?", "answer": "C", "options": list("mnop")},
    ]
    (tmp_path / "race.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "local.yaml").write_text(
        f"include: {harness.TASK_FILES}/race_middle.yaml\ntask: race_middle_local\ndataset_path: json\n"
        f"dataset_name: null\ndataset_kwargs: {{data_files: {{test: {tmp_path}/race.jsonl}}}}\n"
    )
    names, manager = harness.load_tasks([str(tmp_path / "local.yaml")], "")
    task = manager.load(names)["tasks"]["race_middle_local"]
    docs = list(task.test_docs())
    spec = importlib.util.spec_from_file_location(
        "race", pathlib.Path(lm_eval.tasks.__file__).parent / "race/preprocess_race.py"
    )
    race = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(race)
    assert len(docs) == 2
    for doc in docs:
        problems = {"article": doc["article"], "problems": repr(doc["problems"])}
        assert task.doc_to_text(doc) == race.doc_to_text(problems)
        assert task.doc_to_choice(doc) == race.doc_to_choice(problems)
        assert task.doc_to_target(doc) == race.doc_to_target(problems)


@pytest.mark.slow  # reads the harness's list of all tasks: ten seconds
@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (["boolqq"], "task 'boolqq' is neither in lm-evaluation-harness nor in --include: did you mean boolq"),
        (["nothing.yaml"], "task nothing.yaml: there is no such file"),
    ],
)
def test_unknown_tasks_are_named(tasks, message):
    with pytest.raises(InputError, match=message):
        harness.load_tasks(tasks, "")


@pytest.mark.slow
def test_table_5_is_the_papers():
    assert harness.load_tasks(["table5"], "")[0] == ["boolq", "piqa", "race_middle", "race", "winogrande"]
