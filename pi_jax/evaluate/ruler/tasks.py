"""The synthetic tasks of RULER (Hsieh et al. 2024) that need no download: their prompts and their scoring.

Prompts, complexity and scoring follow NVIDIA's scripts (github.com/NVIDIA/RULER, scripts/data/synthetic): needles in a
haystack of noise, essays or other needles; variable tracking; common and frequent words. A prompt is as long as the
given length allows: the haystack grows in units (sentences, needles or words) and is never cut. Our choices: each
sample has its own seed and its own example, sentences of essays end where .!? is followed by white space, and word
lists longer than the vocabulary of wonderwords are completed with compounds instead of another vocabulary.
"""

import dataclasses
import functools
import itertools
import math
import random
import re
import string
import uuid
from collections.abc import Callable, Sequence

from pi_jax.errors import InputError

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
THRESHOLD = 85.6
"""Average score that an effective length must reach: the score of Llama-2-7B at 4k."""
_DEPTHS = [round(100 * i / 39) for i in range(40)]
_EXAMPLE_TOKENS = 500
"""Maximum number of tokens of the example of vt, without its answer."""
_FREQUENT_NEW_TOKENS = 50
"""Maximum number of tokens of an answer of fwe, on which its vocabulary depends."""
_HOPS = 4
"""Number of variables of vt that are assigned another variable."""
_NIAH = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the {kind} afterwards.\n{context}\nWhat are all the special magic {kind} for {query} mentioned in the provided "
    "text? The special magic {kind} for {query} mentioned in the provided text are"
)
_TRACKING = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\nQuestion: Find "
    "all variables that are assigned the value {query} in the text above. Answer: According to the chain(s) of "
    "variable assignment in the text above, {count} variables are assigned the value {query}, they are: "
)
_COMMON = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list? Answer: The top 10 "
    "words that appear most often in the list are:"
)
_FREQUENT = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the "
    "three most frequently appeared words in the above coded text? Answer: According to the coded text above, the "
    "three most frequently appeared words are:"
)


@dataclasses.dataclass(frozen=True)
class Sample:
    """The text of a prompt, and the strings that the answer should contain."""

    text: str
    answers: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Setup:
    """What all prompts of a length share."""

    length: int
    """Tokens of a prompt and its answer together."""
    tokenize: Callable[[str], list[int]]
    """Function from a text to its token ids."""
    essays: str = ""
    """Text of the essays, for the tasks that need it."""


Make = Callable[[random.Random, int, Setup], Sample]
"""Makes a sample from (random numbers, number of haystack units, setup)."""


@dataclasses.dataclass(frozen=True)
class Task:
    """A task of RULER."""

    make: Make
    new_tokens: int
    """Maximum number of tokens of an answer."""
    least: int
    """Number of units of the smallest haystack."""
    essays: bool = False
    """Whether the haystack consists of essays, which the user must provide."""


# ---- Needles in a haystack.


def _needles(
    rng: random.Random,
    size: int,
    setup: Setup,
    *,
    haystack: str,
    keys: str = "words",
    kind: str = "numbers",
    num_keys: int = 1,
    num_values: int = 1,
    num_queries: int = 1,
) -> Sample:
    names = {"words": lambda: f"{rng.choice(_words('adjectives'))}-{rng.choice(_words('nouns'))}"}
    names["numbers"] = lambda: str(rng.randint(10**6, 10**7 - 1))
    names["uuids"] = lambda: str(uuid.UUID(int=rng.getrandbits(128), version=4))
    hidden: dict[str, list[str]] = {}
    while len(hidden) < max(num_keys, num_queries):
        hidden[names[keys]()] = [names[kind]() for _ in range(num_values)]
    needles = [NEEDLE.format(kind=kind, key=key, value=value) for key, values in hidden.items() for value in values]
    rng.shuffle(needles)
    if haystack == "essay":
        context = _into_essay(rng, needles, setup.essays, size)
    else:
        hay = [NOISE] * size
        if haystack == "needle":
            hay = [NEEDLE.format(kind=kind, key=names[keys](), value=names[kind]()) for _ in range(size)]
        for at, needle in zip(sorted(rng.sample(range(size), len(needles)), reverse=True), needles, strict=True):
            hay.insert(at, needle)
        context = "\n".join(hay)
    asked = rng.sample(list(hidden), num_queries)
    query = asked[0] if len(asked) == 1 else ", ".join(asked[:-1]) + ", and " + asked[-1]
    template = _NIAH
    if num_queries * num_values == 1:
        kind = kind[:-1]
        template = template.replace("Some", "A").replace("are all", "is").replace("are", "is")
    return Sample(
        template.format(kind=kind, context=context, query=query), tuple(v for key in asked for v in hidden[key])
    )


def _into_essay(rng: random.Random, needles: Sequence[str], essays: str, words: int) -> str:
    sentences = re.split(r"(?<=[.!?])\s+", _first_words(essays, words))
    depths = sorted(rng.sample(_DEPTHS, len(needles)))
    cuts = [0, *(len(sentences) * depth // 100 for depth in depths), len(sentences)]
    # As in NVIDIA's script, an empty piece before, between or after needles adds a blank.
    pieces = [" ".join(sentences[a:b]) for a, b in itertools.pairwise(cuts)]
    return " ".join([text for pair in zip(pieces, needles, strict=False) for text in pair] + pieces[-1:])


@functools.lru_cache(maxsize=4)
def _split(text: str) -> list[str]:
    return text.split()


def _first_words(text: str, count: int) -> str:
    words = _split(text)
    return " ".join((words * -(-count // len(words)))[:count])


# ---- Variable tracking.


def _tracking(rng: random.Random, size: int, setup: Setup) -> Sample:
    example = _chain(rng, _example_size(setup.tokenize), letters=3)
    asked = _chain(rng, size, letters=5)
    # Two blanks, as NVIDIA has it: the prompt ends with one, and the first token of an answer usually has another.
    return Sample(f"{example.text} {' '.join(example.answers)}\n\n{asked.text}", asked.answers)


@functools.lru_cache(maxsize=1)
def _example_size(tokenize: Callable[[str], list[int]]) -> int:
    """Returns the number of noise sentences in the example: as many as fit, whatever the length of the prompt."""
    return _largest(
        lambda size: len(tokenize(_chain(random.Random(0), size, letters=3).text)) <= _EXAMPLE_TOKENS, _HOPS + 1
    )


def _chain(rng: random.Random, size: int, letters: int) -> Sample:
    names: list[str] = []
    while len(names) < _HOPS + 1:
        name = "".join(rng.choices(string.ascii_uppercase, k=letters))
        names += [name] if name not in names else []
    value = str(rng.randint(10000, 99999))
    chain = [f"VAR {names[0]} = {value}", *(f"VAR {b} = VAR {a} " for a, b in itertools.pairwise(names))]
    hay = [NOISE] * size
    for i, at in enumerate(sorted(rng.sample(range(size), len(chain)))):
        hay.insert(at + i, chain[i])
    return Sample(_TRACKING.format(context="\n".join(hay), query=value, count=len(names)), tuple(names))


# ---- Common and frequent words.


@functools.cache
def _words(category: str) -> list[str]:
    try:
        from wonderwords import RandomWord
    except ImportError:
        raise InputError("evaluate ruler needs the word lists of wonderwords: pip install 'pi_jax[eval]'") from None
    return sorted(RandomWord().filter(include_categories=[category]))


@functools.cache
def _vocabulary() -> list[str]:
    return sorted({*_words("nouns"), *_words("adjectives"), *_words("verbs")})


def _different_words(rng: random.Random, count: int) -> list[str]:
    """Draws words of cwe. Those that the vocabulary lacks are compounds, like the keys of the needles."""
    words = dict.fromkeys(_vocabulary())
    while len(words) < count:
        words[f"{rng.choice(_words('adjectives'))}-{rng.choice(_words('nouns'))}"] = None
    return rng.sample(list(words), count)


def _common(rng: random.Random, size: int, setup: Setup) -> Sample:
    long = setup.length >= 4096
    example = _list(rng, *((40, 10, 3) if long else (20, 3, 1)))
    asked = _list(rng, size, *((30, 3) if long else (6, 1)))
    right = " ".join(f"{i}. {word}" for i, word in enumerate(example.answers, 1))
    return Sample(f"{example.text} {right}\n{asked.text}", asked.answers)


def _list(rng: random.Random, words: int, often: int, seldom: int, common: int = 10) -> Sample:
    chosen = _different_words(rng, words)
    shuffled = chosen[:common] * often + chosen[common:] * seldom
    rng.shuffle(shuffled)
    context = " ".join(f"{i}. {word}" for i, word in enumerate(shuffled, 1))
    return Sample(_COMMON.format(context=context), tuple(chosen[:common]))


def _frequent(rng: random.Random, size: int, setup: Setup, alpha: float = 2.0) -> Sample:
    words: dict[str, None] = {}
    while len(words) < max((setup.length - _FREQUENT_NEW_TOKENS) // 50, 4):
        words["".join(rng.choices(string.ascii_lowercase, k=6))] = None
    vocabulary = ["...", *list(words)[1:]]  # the most frequent word is noise
    zeta = math.pi**2 / 6  # zeta(alpha) for alpha = 2
    text = [word for k, word in enumerate(vocabulary, 1) for _ in range(int(size * k**-alpha / zeta))]
    rng.shuffle(text)
    return Sample(_FREQUENT.format(context=" ".join(text)), tuple(vocabulary[1:4]))


def _niah(haystack: str, **settings) -> Task:
    make = functools.partial(_needles, haystack=haystack, **settings)
    return Task(make, 128, least=1 if haystack != "essay" else 50, essays=haystack == "essay")


TASKS = {
    "niah_single_1": _niah("noise"),
    "niah_single_2": _niah("essay"),
    "niah_single_3": _niah("essay", kind="uuids"),
    "niah_multikey_1": _niah("essay", num_keys=4),
    "niah_multikey_2": _niah("needle"),
    "niah_multikey_3": _niah("needle", keys="uuids", kind="uuids"),
    "niah_multivalue": _niah("essay", num_values=4),
    "niah_multiquery": _niah("essay", num_queries=4),
    "vt": Task(_tracking, 30, least=_HOPS + 1),
    "cwe": Task(_common, 120, least=20),
    "fwe": Task(_frequent, _FREQUENT_NEW_TOKENS, least=50),
}
"""Name of each task -> the task. qa_1 and qa_2 are missing because their questions must be downloaded."""


def _largest(fits: Callable[[int], bool], least: int) -> int:
    """Returns the largest size that fits, at least `least`: doubled until it does not fit, then bisected."""
    low, high = least, 2 * least
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _build(name: str, setup: Setup, seed: int, index: int, size: int) -> tuple[list[int], Sample]:
    sample = TASKS[name].make(random.Random(f"{seed} {name} {setup.length} {index}"), size, setup)
    return setup.tokenize(sample.text), sample


def require_room(name: str, setup: Setup, seed: int) -> None:
    """Checks that the smallest prompt of a task and its answer fit.

    Raises:
      InputError: if they do not.
    """
    task = TASKS[name]
    need = len(_build(name, setup, seed, 0, task.least)[0]) + task.new_tokens
    if need > setup.length:
        raise InputError(
            f"length {setup.length} is too short for task {name}: the smallest prompt and its answer need {need}"
        )


def make_samples(name: str, count: int, setup: Setup, seed: int) -> list[tuple[list[int], Sample]]:
    """Makes prompts of a task, as token ids and text, each as long as possible while it and its answer fit.

    Args:
      name: name of the task.
      count: number of prompts.
      setup: length in tokens, tokenizer and essays.
      seed: random seed.

    Raises:
      InputError: if a prompt with the smallest haystack is too long.
    """
    require_room(name, setup, seed)
    task = TASKS[name]
    room = setup.length - task.new_tokens
    largest = _largest(lambda size: len(_build(name, setup, seed, 0, size)[0]) <= room, task.least)
    samples = []
    for index in range(count):
        size = largest
        made = _build(name, setup, seed, index, size)
        while len(made[0]) > room and size > task.least:
            size = max(task.least, size - max(1, size // 100))
            made = _build(name, setup, seed, index, size)
        samples.append(made)
    return samples


def score(prediction: str, answers: Sequence[str]) -> float:
    """Returns the percentage of the answers that the prediction contains, ignoring case (RULER's string_match_all)."""
    return 100 * sum(a.lower() in prediction.lower() for a in answers) / len(answers)
