"""RULER: prompts and scores against NVIDIA's format and its copy in lm-evaluation-harness, lengths, and the command."""

import collections
import importlib
import itertools
import json
import random
import re
import types

import pytest

from pi_jax.data.tokenizer import load_tokenizer
from pi_jax.evaluate import result
from pi_jax.evaluate.ruler import command, tasks
from pi_jax.evaluate.ruler.tasks import NOISE, TASKS, Setup, make_samples, require_room, score

ESSAYS = " ".join(f"This is sentence {i} of an essay about nothing." for i in range(400))
_TOKEN = re.compile(r" ?[A-Za-z]{1,4}|\d|\s|.")
_LARGE_TOKEN = re.compile(r" ?[A-Za-z]+|\d{1,3}|\s|.")


def _tokenize(text):
    """About as many tokens as LLaMA's tokenizer makes: digits are tokens of their own."""
    return _TOKEN.findall(text)


def _sample(name, size, length=1024, seed=0):
    return TASKS[name].make(random.Random(seed), size, Setup(length, _tokenize, ESSAYS))


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
        head = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
        assert text.startswith(head)
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
        # The blank with which the question ends and one more before the answer of the example.
        assert text.endswith(question + ("" if answers else " " + " ".join(chain)))
        assert answers in (None, tuple(chain))
        lines = text[len(head) : text.index(question)].split("\n")
        assert set(lines) == {
            NOISE,
            f"VAR {first} = {value}",
            *(f"VAR {b} = VAR {a} " for a, b in itertools.pairwise(chain)),
        }
    assert asked.count(NOISE) == 20


@pytest.mark.parametrize("tokenize", [_TOKEN.findall, _LARGE_TOKEN.findall])
@pytest.mark.parametrize("length", [2048, 4096, 32768])
def test_the_example_of_variable_tracking_has_500_tokens(tokenize, length):
    (_, sample), *_ = make_samples("vt", 1, Setup(length, tokenize), 0)
    example = sample.text.split("they are: ")[0] + "they are: "
    assert 500 - len(tokenize(f"{NOISE}\n")) < len(tokenize(example)) <= 500


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
    setup = Setup(4000, lambda t: backend.encode(t, add_special_tokens=False).ids, ESSAYS)
    made = [make_samples(name, 2, setup, s) for s in (1, 1, 2)]
    assert made[0] == made[1] != made[2]
    for tokens, sample in made[0]:
        assert 0.85 * 4000 < len(tokens) + TASKS[name].new_tokens <= 4000
        assert len(tokens) == len(sample.text.encode())
    assert made[0][0][1] != made[0][1][1]


@pytest.mark.parametrize("name", TASKS)
def test_prompts_of_131072_tokens_are_made(name):
    setup = Setup(131072, _tokenize, ESSAYS)
    require_room(name, setup, 0)
    ((tokens, sample),) = make_samples(name, 1, setup, 0)
    assert 131072 - 100 < len(tokens) + TASKS[name].new_tokens <= 131072
    assert all(answer in sample.text for answer in sample.answers)


def test_more_words_than_the_vocabulary_has_are_completed_with_compounds():
    """With large tokens, 131,072 of them hold more different words than wonderwords has."""
    known = tasks._vocabulary()
    ((tokens, sample),) = make_samples("cwe", 1, Setup(131072, _LARGE_TOKEN.findall), 0)
    assert 131072 - 100 < len(tokens) + 120 <= 131072
    asked = sample.text.split("\nBelow is", 1)[1].split("\nQuestion:")[0]
    counts = collections.Counter(re.findall(r"\d+\. (.+?)(?= \d+\. |$)", asked))
    assert len(counts) > len(known) and set(known) < set(counts)
    assert all("-" in word for word in set(counts) - set(known))
    assert {word for word, n in counts.items() if n == 30} == set(sample.answers)
    assert set(counts.values()) == {30, 3}


@pytest.mark.parametrize(("length", "words"), [(2048, 39), (4096, 80), (8192, 162)])
def test_coded_words_are_drawn_from_a_vocabulary_for_the_room_without_the_answer(length, words):
    """In a text so long that each of them occurs."""
    text = _sample("fwe", 2 * words**2, length).text
    assert len(set(re.search(r"coded words\. (.*)\nQuestion", text)[1].split())) == words


@pytest.fixture(scope="module")
def theirs():
    """NVIDIA's code as adapted in lm-evaluation-harness; the sentences of essays end where ours do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", "1")  # process 0 would download a model of NLTK
        names = ("prepare_niah", "niah_utils", "vt_utils", "cwe_utils", "fwe_utils")
        modules = {name: importlib.import_module(f"lm_eval.tasks.ruler.{name}") for name in names}
        patch.setattr(modules["prepare_niah"], "cached_sent_tokenize", lambda text: re.split(r"(?<=[.!?])\s+", text))
        yield types.SimpleNamespace(**modules)


def _their_tokenizer(text):
    return types.SimpleNamespace(input_ids=_tokenize(text))


_THEIR_NEEDLES = {
    "niah_single_1": ("repeat", {}),
    "niah_single_2": ("essay", {}),
    "niah_single_3": ("essay", {"type_needle_v": "uuids"}),
    "niah_multikey_1": ("essay", {"num_needle_k": 4}),
    "niah_multikey_2": ("needle", {}),
    "niah_multikey_3": ("needle", {"type_needle_k": "uuids", "type_needle_v": "uuids"}),
    "niah_multivalue": ("essay", {"num_needle_v": 4}),
    "niah_multiquery": ("essay", {"num_needle_q": 4}),
}
"""The settings of niah_utils.py."""


def _their_samples(theirs, name, length, count):
    """Full prompts (the harness separates the beginning of the answer), answers, and the length that they state."""
    random.seed(0)
    if name in _THEIR_NEEDLES:
        haystack, settings = _THEIR_NEEDLES[name]
        hay = ESSAYS.split(" ") * 8 if haystack == "essay" else theirs.prepare_niah.get_haystack(haystack)
        made = theirs.prepare_niah.generate_samples(
            hay,
            _their_tokenizer,
            max_seq_length=length,
            num_samples=count,
            type_haystack=haystack,
            template=theirs.niah_utils.TEMPLATE,
            **{"type_needle_k": "words", "type_needle_v": "numbers", **settings},
        )
    elif name == "vt":
        (example,) = theirs.vt_utils.sys_vartrack_w_noise_random(_their_tokenizer, 1, 500, incremental=5)
        made = theirs.vt_utils.sys_vartrack_w_noise_random(_their_tokenizer, count, length, icl_example=example)
    elif name == "cwe":
        made = theirs.cwe_utils.sys_word_pair_random(count, length, _their_tokenizer)
        for one in made:
            one["input"] = f"{one['input_example']}\n{one['input']}"
    else:
        made = theirs.fwe_utils.sys_kwext(_their_tokenizer, length, count)
    # Only vt has a separator of its own within `input`.
    return [(f"{one['input'].strip()} {one['gen_prefix']}", one["outputs"], one["length"]) for one in made]


def _skeleton(name, text):
    """The form of a prompt: what is drawn replaced by signs, what is repeated said once."""
    text = re.sub(r" for [^.\n]+?( is: | mentioned)", r" for KEY\1", _shape(text))
    text = re.sub(r"(?<=\n)[^\n]*sentence \d+ of an essay[^\n]*", lambda found: _essay(found[0]), text)
    text = re.sub(rf"({re.escape(NOISE)}\n)+", f"{NOISE}\n", text)
    text = re.sub(r"(One of the special magic \w+ for KEY is: (NUMBER|UUID)\.\n)+", "NEEDLES\n", text)
    text = re.sub(r"1\. [^\n]*", "LIST", text)
    text = re.sub(r"coded words\. [a-z. ]*\n", "coded words. CODE\n", text)
    if name == "vt":
        text = re.sub(r"\b[A-Z]{5}\b", "abcde", re.sub(r"\b(?!VAR)[A-Z]{3}\b", "abc", text))
        text = re.sub(r"\b\d{5}\b", "VALUE", text)
        return re.sub(rf"(({re.escape(NOISE)}|VAR \w+ = (VAR )?\w+)\s+)+", "CONTEXT ", text)
    # A needle may come before or after all of the haystack.
    return text.replace(f"NEEDLES\n{NOISE}\n", f"{NOISE}\nNEEDLES\n").replace(f"{NOISE}\n" * 2, f"{NOISE}\n")


def _essay(text):
    pieces = re.split(r"One of the special magic \w+ for KEY is: (?:NUMBER|UUID)\.", text)
    whole = r"(This is sentence \d+ of an essay about nothing\.(?: |$))*"
    forms = {re.sub(rf"^ ?{whole}(This[\w ]*)?$", "SENTENCES", piece) for piece in pieces}
    return f"{len(pieces) - 1} needles between {sorted(forms)}"


@pytest.mark.parametrize("length", [2048, 4096])
@pytest.mark.parametrize("name", TASKS)
def test_prompts_have_the_form_and_length_of_nvidias(theirs, name, length):
    found = _their_samples(theirs, name, length, 60)
    ours = make_samples(name, 60, Setup(length, _tokenize, ESSAYS), 0)
    # What NVIDIA has changed since: a word was misspelt, the example of vt was followed by two empty lines more, and
    # nothing stood between the example of cwe and its answer. vt alone ends with a blank, which the harness removes.
    now = [(t.replace("assgined", "assigned").replace("\n\n\n\n", "\n\n"), a, n) for t, a, n in found]
    now = [(t.replace("in the list are:1.", "in the list are: 1.") + " " * (name == "vt"), a, n) for t, a, n in now]
    expected = {str(_skeleton(name, text)) for text, _, _ in now}
    assert {str(_skeleton(name, sample.text)) for _, sample in ours} == expected
    assert {len(sample.answers) for _, sample in ours} == {len(answers) for _, answers, _ in now}
    new = TASKS[name].new_tokens
    assert all(len(tokens) + new <= length for tokens, _ in ours)
    if name not in ("cwe", "fwe"):  # the harness does not count the example of cwe and the answer of fwe
        assert max(len(tokens) + new for tokens, _ in ours) >= max(n for _, _, n in now)


def test_needles_lie_at_the_depths_of_nvidias(theirs, monkeypatch):
    """Also at the ends, where the separator remains, and side by side."""
    assert theirs.prepare_niah.DEPTHS == tasks._DEPTHS
    for module, name in ((theirs.prepare_niah, "DEPTHS"), (tasks, "_DEPTHS")):
        monkeypatch.setattr(module, name, [0, 50, 51, 100])
    random.seed(0)
    text, _, _ = theirs.prepare_niah.generate_input_output(
        *(180, ESSAYS.split(" ")),
        **{"type_haystack": "essay", "num_needle_k": 1, "num_needle_v": 4, "template": theirs.niah_utils.TEMPLATE},
        **{"type_needle_k": "words", "type_needle_v": "numbers"},
    )
    ours = _sample("niah_multivalue", 180).text
    expected, found = (
        re.sub(r"NUMBER\.", "NEEDLE", re.sub(r"One of the special magic numbers for \S+ is: ", "", _shape(t)))
        for t in (text, ours)
    )
    assert expected.split("\n")[1] == found.split("\n")[1]
    assert found.split("\n")[1].startswith(" NEEDLE This is sentence 0") and "NEEDLE  NEEDLE" in found


@pytest.mark.parametrize("length", [2048, 4096])
def test_words_are_as_frequent_as_nvidias(theirs, length):
    _, text, answers = theirs.cwe_utils.generate_input_output(60, length)
    ours = _sample("cwe", 60, length)
    listed = [t.split("often.\n")[-1].split("\nQuestion")[0] for t in (text, ours.text)]
    expected, found = (collections.Counter(re.findall(r"\d+\. (.+?)(?= \d+\. |$)", x)) for x in listed)
    assert sorted(found.values()) == sorted(expected.values())
    assert {expected[word] for word in answers} == {found[word] for word in ours.answers}
    vocabulary = (length - 50) // 50
    text, _, _ = theirs.fwe_utils.generate_input_output(10**9, _their_tokenizer, num_words=3000, vocab_size=vocabulary)
    texts = (text, _sample("fwe", 3000, length).text)
    expected, found = (collections.Counter(re.search(r"words\. (.*)\nQ", x)[1].split()) for x in texts)
    assert sorted(found.values()) == sorted(expected.values()) and found["..."] == expected["..."]


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


def test_a_length_is_refused_before_the_weights_are_loaded(inputs, monkeypatch, capsys):
    monkeypatch.setattr(command.LoadedModel, "generator", lambda *_: pytest.fail("the weights were loaded"))
    with pytest.raises(SystemExit) as stop:
        command.main(["--model", inputs["model"], "--lengths", "4096", "100", "--tasks", "fwe", "--samples", "1"])
    assert stop.value.code == 2 and "length 100 is too short for task fwe" in capsys.readouterr().err


def test_without_essays_their_tasks_are_left_out():
    assert [name for name, task in TASKS.items() if not task.essays] == [
        *("niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "cwe", "fwe")
    ]
    assert tasks.THRESHOLD == 85.6
