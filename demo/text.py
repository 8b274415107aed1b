"""The demo's text: public-domain novels, and ledgers, whose next words are decided by facts stated far above.

A ledger states facts ("The harbour lantern is 48213."), lets novels or repeated sentences pass, and comes back to facts
that it stated before ("Which for the harbour lantern? 48213."). Only what was stated tells the answer, so the
perplexity of a ledger measures how far back a model can look. Ledgers are generated: nothing but `rng` decides them.
"""

import collections
import gzip
import json
import pathlib
import re
import sys
from collections.abc import Iterator, Sequence

import numpy as np

FOLDER = pathlib.Path(__file__).parent / "text"
STATEMENTS = (
    "The {key} is {value}.",
    "The {key} was {value}.",
    "Of the {key} they say {value}.",
    "{key}: {value}.",
    "We gave the {key} {value}.",
    "For the {key} write {value}.",
    "Here the {key} has {value}.",
    "{value} is the {key}.",
    "Mark the {key} as {value}.",
    "Let {key} = {value}.",
    "The {key} has {value}. Keep {value} for the {key}.",
    "{value} belongs to the {key}.",
)
RECALLS = (
    "The {key} is {value}.",
    "Again: {key} {value}.",
    "Which for the {key}? {value}.",
    "Now the {key} is {value}.",
    "So the {key} was {value}.",
    "And for the {key} we have {value}.",
    "Recall {key}. It is {value}.",
    "Let {key} = {value}.",
    "{key}: {value}.",
    "Who knows the {key}? The {key} was {value}.",
    "Where was the {key}? The {key} has {value}.",
    "Say the {key}. The {key} is {value}.",
)
PLAIN, VALUE, ANSWER, FILLER = range(4)
"""Kinds of pieces: words of a statement or question; the value of a new fact, which nothing tells; the value of a known
fact, which a statement above tells; other text."""

Piece = tuple[str, int]

HELD_OUT = "persuasion"
"""Part of the file name of the novel that is not trained on."""
CHARACTERS = 9000
"""Of a document for the extended window of 2,048 tokens, with some to spare."""
FILLERS = (0, 1, 3, 4)
"""Fillers of the written ledgers, in turn; see `Ledgers.pieces`."""


def read(name: str) -> list[str]:
    """The documents of a .jsonl.gz file of `text/`."""
    with gzip.open(FOLDER / name, "rt") as file:
        return [json.loads(line)["text"] for line in file]


def novels() -> list[str]:
    """The training novels: Austen's by title, then Moby-Dick. The ledgers depend on the order."""
    paths = sorted((FOLDER / "novels").iterdir(), key=lambda path: (path.name.startswith("moby"), path.name))
    return [document for path in paths for document in read(f"novels/{path.name}")]


def write(name: str, documents: Sequence[str]) -> None:
    """Writes documents to a .jsonl.gz file of `text/`, the same bytes each time."""
    (FOLDER / name).parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents)
    (FOLDER / name).write_bytes(gzip.compress(lines.encode(), 9, mtime=0))


def sentences(text: str) -> list[str]:
    """Short sentences without digits."""
    found = re.split(r"(?<=[.!?])\s+", text)
    return [s for s in found if 10 < len(s) < 90 and re.fullmatch(r"[A-Z][^\d\"_]*[a-z]{4}[.!?]", s)]


def words(text: str) -> list[str]:
    """All words of at least three letters that occur five times, in the order of the alphabet."""
    counts = collections.Counter(re.findall(r"(?<![A-Za-z])[a-z]{3,}(?![A-Za-z])", text))
    return sorted(word for word, count in counts.items() if count >= 5)


class Ledgers:
    """Generates ledgers from the sentences and words of a text."""

    def __init__(self, text: str):
        self._sentences, self._words = sentences(text), words(text)

    def pieces(self, rng: np.random.Generator, length: int, filler: int | None = None) -> Iterator[Piece]:
        """One ledger of at least `length` characters.

        Args:
          rng: decides everything.
          length: characters.
          filler: what stands between the facts. 0: some sentences, repeated; 1: other sentences each time; 2: little;
            3: both kinds; 4: simple statements, repeated, in the words of facts. None: any, the last most often.
        """
        mode = min(int(rng.integers(6)), 4) if filler is None else filler
        repeated = [self._sentences[i] for i in rng.integers(len(self._sentences), size=rng.integers(2, 6))]
        if mode == 4:
            repeated = [self._simple(rng) for _ in range(rng.integers(2, 7))]
        at = 0
        facts: list[tuple[str, str]] = []
        most = 1 + int(rng.integers(6) * max(1.0, length / 1600))
        rate = rng.choice([0.2, 0.5, 0.9]) * min(1.0, (1600 / length) ** 0.5)
        share = (0.55, 0.55, 0.95, 0.7, 0.5)[mode]
        kinds = int(rng.choice(3, p=(0.6, 0.2, 0.2))) if rng.random() < 0.7 else None
        written, space = 0, ""
        while written < length:
            if written and rng.random() > share:
                for _ in range(1 + int(rng.integers(3 if length <= 1000 else 8))):
                    if mode in (0, 4) or (mode == 3 and rng.random() < 0.5):
                        text, at = repeated[at % len(repeated)], at + 1
                    else:
                        text = self._sentences[rng.integers(len(self._sentences))]
                    yield space + text, FILLER
                    written += len(text) + 1
                    space = " "
                continue
            new = not facts or (len(facts) < most and rng.random() < rate)
            if new:
                fact = self._key(rng), self._value(rng, kinds)
                facts.append(fact)
                form = self._form(rng, STATEMENTS)
            else:
                fact = facts[rng.integers(len(facts))] if rng.random() < 0.8 else facts[0]
                form = self._form(rng, RECALLS)
            if not written and form.startswith("{value}"):  # every value follows a blank, so it has the same tokens
                form = STATEMENTS[0]
            if written and not form.startswith("{value}") and rng.random() < 0.15:
                yield "\n", PLAIN
                space = ""
            yield from self._fill(form, fact, space, new)
            written += len(form) + len(fact[0]) + len(fact[1]) - 12
            space = " "

    def _simple(self, rng: np.random.Generator) -> str:
        """A sentence that looks like a fact: what follows a key must be found by the key, not by "is"."""
        words = [self._words[i] for i in rng.integers(len(self._words), size=3)]
        forms = ("The {} is {}.", "The {} was {}.", "The {} {} is {}.", "Here {} {}.", "There the {} and {} again.")
        return forms[rng.choice(5, p=(0.4, 0.15, 0.15, 0.15, 0.15))].format(*words)

    @staticmethod
    def _form(rng: np.random.Generator, forms: Sequence[str]) -> str:
        """Any form, the first ("The KEY is VALUE.") most often."""
        return forms[0] if rng.random() < 0.3 else forms[rng.integers(len(forms))]

    def _key(self, rng: np.random.Generator) -> str:
        size = int(rng.choice((1, 2, 3), p=(0.4, 0.4, 0.2)))
        return " ".join(self._words[i] for i in rng.integers(len(self._words), size=size))

    def _value(self, rng: np.random.Generator, kind: int | None) -> str:
        kind = int(rng.choice(3, p=(0.6, 0.2, 0.2))) if kind is None else kind
        if kind == 0:
            return str(rng.integers(10_000, 100_000))
        return str(rng.integers(100, 1000)) if kind == 1 else self._words[rng.integers(len(self._words))]

    @staticmethod
    def _fill(form: str, fact: tuple[str, str], space: str, new: bool) -> Iterator[Piece]:
        """The pieces of a sentence: a blank belongs to what follows it."""
        key_known = False
        for part in re.findall(r" ?\{\w+\}| ?[^{ ]+(?: [^{ ]+)*", space + form):
            text = part.format(key=fact[0], value=fact[1])
            kind = PLAIN
            if "{key}" in part:
                key_known = True
            elif "{value}" in part:
                kind = VALUE if new else ANSWER if key_known else PLAIN
                new = False  # said again in the same sentence
            yield text, kind

    def text(self, rng: np.random.Generator, length: int, filler: int | None = None) -> str:
        """One ledger as text."""
        return "".join(piece for piece, _ in self.pieces(rng, length, filler))


def main() -> None:
    """Writes `text/` from novels: `python demo/text.py FOLDER`, with one .txt file per novel.

    Training text of the base model and of its extension: `novels/` and `ledgers.jsonl.gz`. Held out: one novel and
    ledgers whose filler is sentences of that novel (`heldout/`).
    """
    novels = {}
    for path in sorted(pathlib.Path(sys.argv[1]).glob("*.txt")):
        text = path.read_text(errors="ignore")
        start, end = re.search(r"\*\*\* ?START OF.*?\*\*\*", text), re.search(r"\*\*\* ?END OF", text)
        text = text[start.end() if start else 0 : end.start() if end else len(text)]
        paragraphs = (" ".join(p.split()) for p in re.split(r"\n\s*\n", text))
        name = "moby_dick" if "MOBY DICK" in text[:2000] else re.sub(r"(_\d+)?_by.*", "", path.stem)
        novels[name] = "\n".join(p for p in paragraphs if p)
    heldout = novels.pop(next(name for name in novels if HELD_OUT in name))
    for name, text in novels.items():
        write(f"novels/{name}.jsonl.gz", [text])
    ledgers, rng = Ledgers("\n".join(novels.values())), np.random.default_rng(2023)
    write("ledgers.jsonl.gz", [ledgers.text(rng, CHARACTERS, FILLERS[i % len(FILLERS)]) for i in range(256)])
    starts = [heldout.index("\n", len(heldout) * i // 8) + 1 for i in range(8)]
    write("heldout/prose.jsonl.gz", [heldout[start : start + CHARACTERS] for start in starts])
    ledgers, rng = Ledgers(heldout), np.random.default_rng(6)
    write("heldout/ledger.jsonl.gz", [ledgers.text(rng, CHARACTERS, FILLERS[i % len(FILLERS)]) for i in range(8)])


if __name__ == "__main__":
    main()
