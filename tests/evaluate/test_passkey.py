"""Passkey: exact prompts, honest scoring, the paper's k_max."""

import itertools
import json
import re

import jax
import pytest

from pi_jax import tiny
from pi_jax.config import ComputeConfig
from pi_jax.data.tokenizer import load_tokenizer
from pi_jax.errors import InputError
from pi_jax.evaluate import passkey, result
from pi_jax.generate import Generator
from pi_jax.model import Llama
from pi_jax.tiny import tiny_model_config


def _word_tokenizer(folder):
    """Words and their blanks as tokens, a BOS in front: nothing like one token a byte."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

    tiny.tiny_tokenizer(folder)
    text = " ".join([passkey.HEADER, passkey.FILLER, passkey.KEY_LINE, passkey.QUESTION])
    words = sorted({w for part in ("", " ", "\n") for x in text.split() for w in re.findall(r"\W|\w+", part + x)})
    names = ["<s>", "</s>", "<unk>", "<pad>", *map(str, range(10)), *words]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(dict.fromkeys(names))}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d|\w+|\W"), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return load_tokenizer(str(folder))


@pytest.fixture(scope="module", params=["bytes", "words"])
def tokenizer(request, inputs, tmp_path_factory):
    if request.param == "bytes":
        return load_tokenizer(inputs["tokenizer"])
    return _word_tokenizer(tmp_path_factory.mktemp("words"))


def test_prompts_are_the_papers_and_exact_to_the_token(tokenizer):
    make = passkey.PromptMaker(tokenizer)
    shortest = len(make.shortest())
    for length, share in itertools.product((shortest, shortest + 1, 2 * shortest + 7, 2000), (0.02, 0.3, 0.8, 1.0)):
        prompt = make(length, 54321, distance=int(share * length))
        assert len(prompt.tokens) == length
        at = len(prompt.tokens) - prompt.distance
        head = tokenizer.decode(prompt.tokens[:at], clean_up_tokenization_spaces=False).replace(" ", "")
        rest = tokenizer.decode(prompt.tokens[at:], clean_up_tokenization_spaces=False).replace(" ", "")
        assert head.endswith("Thepasskeyis") and rest.startswith("54321.Rememberit.54321isthepasskey.\n")
        nearest = make(2000, 54321, distance=0).distance
        assert prompt.distance <= max(int(share * length), nearest)


def test_the_text_is_figure_3(inputs):
    tokenizer = load_tokenizer(inputs["tokenizer"])
    make = passkey.PromptMaker(tokenizer)
    prompt = make(1000, 71432, depth=0.5)
    header, before, key, after, question = tokenizer.decode(prompt.tokens).split("\n")
    assert header == (
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you "
        "about the important information there."
    )
    assert key == "The pass key is 71432. Remember it. 71432 is the pass key."
    assert question == "What is the pass key? The pass key is"
    filler = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
    whole = " ".join([filler] * 20)
    assert whole.endswith(before) and whole.startswith(after) and after.endswith(filler)
    # The key moves by whole repetitions, as near to k as these allow, never farther.
    for k in (250, 500, 800):
        prompt = make(1000, 71432, distance=k)
        assert k - len(filler) - 1 < prompt.distance <= k
    first = make(1000, 71432, distance=1000)
    assert first.distance > 1000 - len(header) - 2 * len(filler)


def test_a_text_too_short_is_refused(tokenizer):
    make = passkey.PromptMaker(tokenizer)
    with pytest.raises(InputError, match=f"at least {len(make.shortest())} tokens"):
        make(len(make.shortest()) - 1, 12345, distance=10)


def test_only_the_key_itself_counts():
    assert passkey.found(" 54321. Remember", 54321) and passkey.found(" the key: 54321", 54321)
    for wrong in ("0", "", " 5432", " 543210", " 12345 54321", "none"):
        assert not passkey.found(wrong, 54321)


def test_k_max_stops_at_the_first_distance_that_fails():
    ks = [256, 512, 768, 1024]
    assert result.effective_length(ks, [1.0, 0.2, 0.5, 0.2], 0.2) == 1024
    assert result.effective_length(ks, [1.0, 0.2, 0.1, 1.0], 0.2) == 512
    assert result.effective_length(ks, [1.0, 0.9, 1.0, 1.0], 1.0) == 256
    assert result.effective_length(ks, [0.1, 1.0, 1.0, 1.0], 0.2) == 0


class _Answers:
    """A generator that answers what it is told to, and remembers what it was asked."""

    def __init__(self, tokenizer, reply):
        self.config, self.batch_shards, self._tokenizer, self._reply = tiny_model_config(), 1, tokenizer, reply
        self.asked = []

    def __call__(self, prompts, max_new_tokens, **_):
        self.asked += prompts
        texts = [self._tokenizer.decode(p) for p in prompts]
        return [self._tokenizer(self._reply(text))["input_ids"] for text in texts]


def _key_in(text):
    return re.search(r"The pass key is (\d+)", text)[1]


def test_always_zero_scores_zero_and_the_key_scores_all(inputs):
    tokenizer = load_tokenizer(inputs["tokenizer"])
    for reply, k_max, rate in ((lambda text: "0", 0, 0.0), (lambda text: " " + _key_in(text), 800, 1.0)):
        model = _Answers(tokenizer, reply)
        found = passkey.measure_distances(model, tokenizer, 800, 4, 3, 0, batch_tokens=4000)
        assert (found["k_max"], found["k_max_strict"], found["success"]) == (k_max, k_max, rate)
        assert {len(p) for p in model.asked} == {800 - passkey.NEW_TOKENS} and len(model.asked) >= 12
        assert len({_key_in(tokenizer.decode(p)) for p in model.asked}) == 12
        grid = passkey.measure_grid(model, tokenizer, [600, 900], [0.0, 0.5, 1.0], 2, 0, batch_tokens=4000)
        assert grid["success"] == [[rate] * 2] * 3 and grid["depths"] == [0.0, 0.5, 1.0]


def test_the_grid_shows_where_a_reader_of_the_end_fails(inputs):
    tokenizer = load_tokenizer(inputs["tokenizer"])
    model = _Answers(tokenizer, lambda text: match[1] if (match := re.search(r"(\d{5}) is the", text[-400:])) else "?")
    grid = passkey.measure_grid(model, tokenizer, [600, 1200], [0.0, 0.25, 0.5, 0.75, 1.0], 1, 0, batch_tokens=4000)
    assert [row[1] for row in grid["success"]] == [0.0, 0.0, 0.0, 1.0, 1.0]
    found = passkey.measure_distances(model, tokenizer, 1200, 6, 1, 0, batch_tokens=4000)
    assert found["k_max"] == 400


def test_the_command_writes_what_it_prints_and_draws(inputs, tmp_path, capsys):
    out, figure = tmp_path / "r.json", tmp_path / "r.png"
    passkey.main(
        ["--model", inputs["model"], "--lengths", "448", "--distances", "2", "--trials", "2", "--grid-lengths", "440"]
        + ["448", "--grid-depths", "0", "1", "--output", str(out), "--figure", str(figure)]
    )
    report = json.loads(out.read_text())
    assert report["command"] == "passkey" and report["results"][0]["length"] == 448
    assert [row["k"] for row in report["results"][0]["by_distance"]] == [224, 448]
    assert report["grid"]["lengths"] == [440, 448] and len(report["grid"]["success"]) == 2
    assert figure.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr()
    assert "k_max 0" in printed.out and "448 tokens exceeds the window of the model, 64" in printed.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"--model": "nowhere"}, "nowhere: there is no such folder"),
        ({"--lengths": "100"}, "length is 100: a passkey prompt and its answer need at least"),
        ({"--trials": "0"}, "trials is 0"),
        ({"--grid-depths": "1.5"}, "grid-depths is (1.5,)"),
        ({"--seed": "-1"}, "seed is -1"),
        ({"--output": "/proc/none/x.json"}, "/proc/none/x.json cannot be written"),
        ({"--figure": "/proc/none/x.png"}, "/proc/none/x.png cannot be written"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(inputs, arguments, message, capsys):
    right = {"--model": inputs["model"], "--lengths": "448", "--distances": "1", "--trials": "1"}
    words = itertools.chain.from_iterable((right | arguments).items())
    with pytest.raises(SystemExit) as stop:
        passkey.main(list(words))
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_vocabulary_that_does_not_fit_is_said(inputs, tmp_path, mesh, capsys):
    from pi_jax.convert.formats import hf

    with jax.set_mesh(mesh):
        small = Llama(
            tiny_model_config(vocab_size=200, bos_token_id=1, eos_token_id=2), ComputeConfig(), jax.random.key(0)
        )
        hf.save(small, str(tmp_path / "m"), inputs["tokenizer"])
    with pytest.raises(SystemExit) as stop:
        passkey.main(["--model", str(tmp_path / "m"), "--lengths", "448"])
    assert stop.value.code == 2 and "the passkey prompt contains token" in capsys.readouterr().err


def test_a_real_generator_gives_the_batch_its_shape_once(inputs, mesh):
    """The last, smaller batch is filled up: no second program."""
    with jax.set_mesh(mesh):
        model = Llama(tiny_model_config(), ComputeConfig(dtype="float32"), jax.random.key(0))
    generator = Generator(model, mesh, max_length=448)
    sizes = []
    call = Generator.__call__

    class Spy(Generator):
        def __call__(self, prompts, *a, **k):
            sizes.append(len(prompts))
            return call(self, prompts, *a, **k)

    generator.__class__ = Spy
    found = passkey.measure_distances(generator, load_tokenizer(inputs["tokenizer"]), 448, 3, 1, 0, batch_tokens=900)
    assert sizes == [2, 2] and found["k_max"] == 0
