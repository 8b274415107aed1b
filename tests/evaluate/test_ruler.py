"""RULER: prompts and scores against samples of NVIDIA's format, lengths, and the command."""

import itertools
import json
import random
import re

import pytest

from pi_jax.data.tokenizer import load_tokenizer
from pi_jax.evaluate import result
from pi_jax.evaluate.ruler import command, tasks
from pi_jax.evaluate.ruler.tasks import NOISE, TASKS, make_samples, score

ESSAYS = " ".join(f"This is sentence {i} of an essay about nothing." for i in range(400))


def _sample(name, size, length=1024, seed=0):
    return TASKS[name].make(random.Random(seed), size, length, ESSAYS)


def _shape(text):
    """A prompt with what is drawn replaced by a sign."""
    text = re.sub(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", "UUID", text)
    text = re.sub(r"\b\d{7}\b", "NUMBER", text)
    return re.sub(r"for [A-Za-z'-]+( is: | mentioned|, |$)", r"for KEY\1", text)


def test_one_needle_is_asked_for_as_in_the_reference():
    """The text of a published niah_single_1 sample, with its key and value replaced."""
    found = _shape(_sample("niah_single_1", 3).text).split("\n")
    assert found[0] == (
        "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about "
        "the number afterwards."
    )
    assert sorted(found[1:5]) == [
        "One of the special magic numbers for KEY is: NUMBER.",
        *["The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."] * 3,
    ]
    assert found[5] == (
        "What is the special magic number for KEY mentioned in the provided text? The special magic number for KEY "
        "mentioned in the provided text is"
    )


def test_several_needles_are_asked_for_in_the_plural():
    values = _sample("niah_multivalue", 400)
    assert values.text.startswith(
        "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you "
        "about the numbers afterwards.\nThis is sentence 0"
    )
    assert len(values.answers) == 4 and len(set(re.findall(r"numbers for (\S+) is: ", values.text))) == 1
    assert all(f"is: {v}." in values.text for v in values.answers)
    queries = _sample("niah_multiquery", 400)
    keys = re.search(
        r"What are all the special magic numbers for (\S+), (\S+), (\S+), and (\S+) mentioned in the provided text\? "
        r"The special magic numbers for .* mentioned in the provided text are$",
        queries.text,
    ).groups()
    assert tuple(re.search(rf"numbers for {k} is: (\d+)\.", queries.text)[1] for k in keys) == queries.answers


@pytest.mark.parametrize(
    ("name", "needles", "kind"),
    [
        ("niah_single_2", 1, "numbers"),
        ("niah_single_3", 1, "uuids"),
        ("niah_multikey_1", 4, "numbers"),
        ("niah_multikey_2", 31, "numbers"),
        ("niah_multikey_3", 31, "uuids"),
    ],
)
def test_the_answer_belongs_to_the_key_among_others(name, needles, kind):
    size = 30 if "multikey_2" in name or "multikey_3" in name else 300
    sample = _sample(name, size)
    found = dict(re.findall(rf"One of the special magic {kind} for (\S+) is: (\S+)\.", sample.text))
    assert len(found) == needles
    asked = re.search(rf"What is the special magic {kind[:-1]} for (\S+) mentioned", sample.text)[1]
    assert sample.answers == (found[asked],)


def test_variables_are_chained():
    sample = _sample("vt", 20)
    example, asked = sample.text.split("\n\nMemorize and track", 1)
    for text, letters, answers in ((example, 3, None), ("Memorize and track" + asked, 5, sample.answers)):
        assert text.startswith(
            "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
        )
        first, value = re.search(r"VAR (\w+) = (\d{5})\b", text).groups()
        links = dict(reversed(pair) for pair in re.findall(r"VAR (\w+) = VAR (\w+) ", text))
        chain = [first]
        while chain[-1] in links:
            chain.append(links[chain[-1]])
        assert len(chain) == 5 and {len(name) for name in chain} == {letters}
        question = (
            f"\nQuestion: Find all variables that are assigned the value {value} in the text above. Answer: According "
            f"to the chain(s) of variable assignment in the text above, 5 variables are assigned the value {value}, "
            "they are: "
        )
        assert text.endswith(question + ("" if answers else " ".join(chain)))
        assert answers in (None, tuple(chain))
    assert sample.text.count(NOISE) == 30


@pytest.mark.parametrize(("length", "often", "seldom"), [(1024, 6, 1), (4096, 30, 3)])
def test_common_words_are_as_common_as_in_the_reference(length, often, seldom):
    sample = _sample("cwe", 50, length)
    example, asked = sample.text.split("\nBelow is", 1)
    words = re.findall(r"\d+\. (\S+)", asked.split("Question:")[0])
    counts = {w: words.count(w) for w in words}
    assert {w for w, n in counts.items() if n == often} == set(sample.answers) and len(sample.answers) == 10
    assert set(counts.values()) == {often, seldom} and len(counts) == 50
    assert asked.endswith(
        "Question: What are the 10 most common words in the above list? Answer: The top 10 words that appear most "
        "often in the list are:"
    )
    assert re.search(r"in the list are: 1\. \S+ 2\. .* 10\. \S+$", example)


def test_frequent_words_are_the_three_after_the_dots():
    sample = _sample("fwe", 400)
    context = re.search(r"coded words\. (.*)\nQuestion: Do not provide any explanation\. Please ignore", sample.text)[1]
    words = context.split()
    ranked = sorted(set(words), key=words.count, reverse=True)
    assert ranked[0] == "..." and tuple(ranked[1:4]) == sample.answers
    assert words.count("...") == int(400 * 6 / 3.141592653589793**2) and {len(w) for w in sample.answers} == {6}


@pytest.mark.parametrize("name", TASKS)
def test_prompts_fill_the_length_and_depend_on_the_seed(name, inputs):
    backend = load_tokenizer(inputs["tokenizer"]).backend_tokenizer
    made = [
        make_samples(name, 2, 4000, lambda t: backend.encode(t, add_special_tokens=False).ids, ESSAYS, s)
        for s in (1, 1, 2)
    ]
    assert made[0] == made[1] != made[2]
    for tokens, sample in made[0]:
        assert 0.85 * 4000 < len(tokens) + TASKS[name].new_tokens <= 4000
        assert len(tokens) == len(sample.text.encode())
    assert made[0][0][1] != made[0][1][1]


def test_scores_are_shares_of_the_answers_that_are_there():
    assert score("It is 1234567.", ("1234567",)) == 100 and score("123456", ("1234567",)) == 0
    assert score("ABCDE, fghij and more", ("abcde", "FGHIJ", "KLMNO", "PQRST")) == 50


def test_the_effective_length_ends_where_the_average_falls():
    assert result.effective_length((16384, 4096, 8192, 32768), (90.0, 95.0, 85.6, 85.5), tasks.THRESHOLD) == 16384
    assert result.effective_length((4096, 8192), (85.59, 99.0), tasks.THRESHOLD) == 0


@pytest.mark.slow
def test_the_command_writes_what_it_prints(inputs, tmp_path, capsys):
    out = tmp_path / "r.json"
    command.main(
        ["--model", inputs["model"], "--lengths", "900", "1000", "--tasks", "niah_single_1", "fwe", "--samples", "2"]
        + ["--output", str(out)]
    )
    report = json.loads(out.read_text())
    assert report["command"] == "ruler" and [r["length"] for r in report["results"]] == [900, 1000]
    assert set(report["results"][0]["tasks"]) == {"niah_single_1", "fwe"} and report["effective_length"] == 0
    assert "effective length (average of at least 85.6): 0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"--tasks": "niah_single_9"}, "unknown task 'niah_single_9': choose from niah_single_1"),
        ({"--tasks": "niah_single_2"}, "niah_single_2 hides its needles in essays"),
        ({"--samples": "0"}, "samples is 0"),
        ({"--lengths": "100"}, "length 100 is too short for task niah_single_1"),
        ({"--essays": "nothing.txt"}, "nothing.txt"),
        ({"--model": "nowhere"}, "nowhere: there is no such folder"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(inputs, arguments, message, capsys):
    right = {"--model": inputs["model"], "--lengths": "900", "--tasks": "niah_single_1", "--samples": "1"}
    words = itertools.chain.from_iterable((right | arguments).items())
    with pytest.raises(SystemExit) as stop:
        command.main(list(words))
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_without_essays_their_tasks_are_left_out():
    assert [name for name, task in TASKS.items() if not task.essays] == [
        *("niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "cwe", "fwe")
    ]
    assert tasks.THRESHOLD == 85.6
