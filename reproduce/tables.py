r"""Fills a table of Chen et al. 2023 with our numbers beside the paper's: trains what is missing, evaluates, prints.

    python reproduce/tables.py 1 --text pg19/test
    python reproduce/tables.py 2 --text proof-pile.jsonl --max-tokens 32768
    python reproduce/tables.py 3 --text pg19/test
    python reproduce/tables.py 4
    python reproduce/tables.py 5
    python reproduce/tables.py 6 --govreport govreport/

Weights are expected in `models/llama-7b` and so on, and the tokenized training text in `data/pile`, as in the
docstrings of `configs/`. Each row is a run of `configs/` and stays in `--output`; what is done is not repeated.
`--only 7B-8192` selects rows, `--dry-run` prints the commands. `--smoke` makes every table with the built-in tiny
model: its numbers mean nothing, but every command runs.
"""

import dataclasses
import json
import pathlib
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence

import tyro

from pi_jax import cli
from pi_jax.errors import InputError

WINDOWS = (2048, 4096, 8192, 16384, 32768)
STEPS = (0, 200, 400, 600, 800, 1000, 10000)
TASKS = ("boolq", "piqa", "race_middle", "race", "winogrande")
ROUGE = ("rouge1", "rouge2", "rougeL")
BASE, DIRECT, LINEAR = "none", "FT", "PI"


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a table: a model, and what the paper reports for it, in the order of the columns."""

    size: str
    window: int
    method: str
    paper: tuple[float | str | None, ...]

    @property
    def name(self) -> str:
        """For example 7B-8192-PI."""
        return f"{self.size}-{self.window}-{self.method}"

    @property
    def config(self) -> str:
        """Experiment file of the run."""
        direct = "_direct" if self.method == DIRECT else ""
        return f"configs/{self.size.lower()}_{self.window // 1024}k{direct}.py"


def _rows(text: str) -> tuple[Row, ...]:
    """Reads a table: size, window, method, numbers."""
    found = []
    for line in text.strip().splitlines():
        size, window, method, *numbers = line.split()
        paper = tuple(None if n == "-" else n if n.startswith(">") else float(n) for n in numbers)
        found.append(Row(size, int(window), method, paper))
    return tuple(found)


TABLE_1 = _rows("""
    7B   2048 none 7.20 >1e3 >1e3 >1e3 >1e3
    7B   8192 FT   7.21 7.34 7.69 - -
    7B   8192 PI   7.13 6.96 6.95 - -
    7B  16384 PI   7.11 6.93 6.82 6.83 -
    7B  32768 PI   7.23 7.04 6.91 6.80 6.77
    13B  2048 none 6.59 - - - -
    13B  8192 FT   6.56 6.57 6.69 - -
    13B  8192 PI   6.55 6.42 6.42 - -
    13B 16384 PI   6.56 6.42 6.31 6.32 -
    13B 32768 PI   6.54 6.40 6.28 6.18 6.09
    33B  2048 none 5.82 - - - -
    33B  8192 FT   5.88 5.99 6.21 - -
    33B  8192 PI   5.82 5.69 5.71 - -
    33B 16384 PI   5.87 5.74 5.67 5.68 -
    65B  2048 none 5.49 - - - -
    65B  8192 PI   5.42 5.32 5.37 - -
""")
TABLE_2 = _rows("""
    7B   2048 none 2.77 - - - -
    7B   8192 FT   2.85 2.74 2.73 - -
    7B   8192 PI   2.79 2.57 2.39 - -
    7B  16384 PI   2.79 2.57 2.37 2.25 -
    7B  32768 PI   2.82 2.59 2.39 2.24 2.48
    13B  2048 none 2.66 - - - -
    13B  8192 FT   2.71 2.56 2.50 - -
    13B  8192 PI   2.67 2.47 2.30 - -
    13B 16384 PI   2.68 2.47 2.29 2.18 -
    13B 32768 PI   2.68 2.46 2.28 2.15 2.35
    33B  2048 none 2.49 - - - -
    33B  8192 FT   2.56 2.48 2.47 - -
    33B  8192 PI   2.50 2.32 2.18 - -
    33B 16384 PI   2.53 2.34 2.18 2.07 -
    65B  2048 none 2.42 - - - -
    65B  8192 PI   2.43 2.26 2.12 - -
""")
TABLE_3 = _rows("""
    7B  8192 PI  16.10 7.12 7.10 7.02 6.99 6.95 -
    7B 16384 PI 112.13 7.05 6.93 6.88 6.84 6.83 -
""")
TABLE_4 = _rows("""
    7B   8192 FT - 1792 2048 2048 2048 2304 2560
    33B  8192 FT - 1792 2048 1792 2048 2304 -
    7B   8192 PI - 8192 8192 8192 8192 8192 -
    7B  16384 PI - 16384 16384 16384 16384 16384 -
    7B  32768 PI - 32768 32768 18432 32768 32768 -
    33B  8192 PI - 8192 8192 8192 8192 8192 -
    33B 16384 PI - 16384 16384 16384 16384 16384 -
""")
TABLE_5 = _rows("""
    7B   2048 none 76.1 78.9 55.7 42.2 69.6
    7B   8192 PI   73.2 78.2 53.8 41.7 69.0
    7B  16384 PI   69.8 77.6 53.3 40.9 67.8
    7B  32768 PI   64.7 77.2 50.1 39.6 66.9
    33B  2048 none 81.6 80.2 61.1 45.9 76.2
    33B  8192 PI   80.2 80.7 60.2 45.7 75.9
""")
TABLE_6 = _rows("7B 16384 PI 60.0 28.0 29.5")
TABLES = {1: TABLE_1, 2: TABLE_2, 3: TABLE_3, 4: TABLE_4, 5: TABLE_5, 6: TABLE_6}
TITLES = {
    1: "Table 1: PG-19, perplexity by evaluation window",
    2: "Table 2: proof-pile, perplexity by evaluation window (paper: window means)",
    3: "Table 3: PG-19, perplexity at the extended window by training steps",
    4: "Table 4: passkey, k_max by training steps",
    5: "Table 5: benchmarks inside 2,048 tokens, accuracy in % (fine-tuned on the Pile)",
    6: "Table 6: GovReport, ROUGE F-measure in %",
}
HEADS = {1: WINDOWS, 2: WINDOWS, 3: STEPS, 4: STEPS, 5: TASKS, 6: ROUGE}


@dataclasses.dataclass(frozen=True)
class Options:
    """Fill a table of Chen et al. 2023."""

    table: tyro.conf.Positional[int]
    """1 to 6."""
    text: tuple[str, ...] = ()
    """Tables 1 to 3: the test documents, as text files, folders or globs."""
    govreport: str = ""
    """Table 6: folder with train.jsonl and test.jsonl, fields `report` and `summary`."""
    max_tokens: int | None = None
    """Cut documents to this many tokens (the paper's proof-pile: 32768)."""
    stride: int = 256
    only: str = ""
    """Only rows whose name begins so, such as 7B or 7B-8192-PI."""
    models: str = "models"
    """Folder with llama-7b, llama-13b, ..."""
    output: str = "runs/reproduce"
    """Folder of runs and results."""
    tasks: tuple[str, ...] = ("table5",)
    """Table 5: tasks of lm-evaluation-harness."""
    smoke: bool = False
    """The built-in tiny model instead, in minutes."""
    dry_run: bool = False
    """Print the commands and run nothing."""


class Table:
    """One table with its rows; collects our numbers."""

    def __init__(self, options: Options):
        self.options, self.output = options, pathlib.Path(options.output)
        if options.table not in TABLES:
            raise InputError(f"table is {options.table}: it must be 1 to 6")
        self.rows = [row for row in TABLES[options.table] if row.name.startswith(options.only)]
        if not self.rows:
            names = ", ".join(row.name for row in TABLES[options.table])
            raise InputError(f"--only is {options.only!r}: table {options.table} has {names}")
        if options.smoke:  # one row of each method shows every command
            self.rows = list({row.method: row for row in reversed(self.rows)}.values())

    def path(self, row: Row) -> str:
        """Folder of the model of a row."""
        if row.method != BASE:
            return f"{self.output}/{row.name}"
        if self.options.smoke:
            from pi_jax.tiny import tiny_inputs

            return tiny_inputs()["model"]
        return f"{self.options.models}/llama-{row.size.lower()}"

    def tokens(self, window: int) -> int:
        """A window of the paper, or its counterpart for the tiny model."""
        return window // 32 if self.options.smoke else window

    def text(self) -> tuple[str, ...]:
        """The test documents."""
        if self.options.smoke and not self.options.text:
            from pi_jax.tiny import tiny_inputs

            return (tiny_inputs()["heldout"],)
        if not self.options.text:
            raise InputError(f"table {self.options.table} needs --text: the test documents")
        return self.options.text

    def run(self, product: str, *words: object) -> None:
        """Runs a command of pi_jax, unless its product exists."""
        command = ["python", "-m", "pi_jax", *map(str, words)]
        if pathlib.Path(product).exists():
            return
        print("$", shlex.join(command), flush=True)
        if not self.options.dry_run and (status := subprocess.run([sys.executable, *command[1:]]).returncode):
            sys.exit(status)

    def train(self, row: Row) -> None:
        """Trains the run of a row, which the tables share: passkey (Table 4) and PG-19 (Table 3) on the way."""
        if row.method == BASE:
            return
        smoke = (
            ("--smoke",)
            if self.options.smoke
            else ("--train.init-from", f"{self.options.models}/llama-{row.size.lower()}")
        )
        window = self.tokens(row.window)
        words = ["--train.output", self.path(row), "--evaluate.every", 2 if self.options.smoke else 200]
        words += ["--evaluate.passkey-lengths", 512 if self.options.smoke else window, "--evaluate.data"]
        if self.options.table in (1, 3):
            words += [*self.text(), "--evaluate.windows", window, "--evaluate.stride", self.stride]
        self.run(f"{self.path(row)}/result.json", "train", "--config", row.config, *smoke, *words)

    @property
    def stride(self) -> int:
        """Stride of the sliding window."""
        return 32 if self.options.smoke else self.options.stride

    def ours(self, row: Row) -> list[float | None]:
        """Our numbers for a row."""
        self.train(row)
        return list(getattr(self, f"table_{self.options.table}")(row))

    def table_1(self, row: Row) -> Iterator[float | None]:
        """Perplexity in each window for which the paper has a number."""
        asked = [self.tokens(w) for w, cell in zip(WINDOWS, row.paper, strict=True) if cell is not None]
        file = self.output / "results" / f"{row.name}-table{self.options.table}.json"
        limit = self.options.max_tokens or (1024 if self.options.smoke else None)
        words = ["--data", *self.text(), "--windows", *asked, "--stride", self.stride]
        words += ["--max-tokens", limit] if limit else []
        self.run(file, "evaluate", "perplexity", "--model", self.path(row), *words, "--output", file)
        results = {r["window"]: r for r in self.read(file)["results"]} if file.exists() else {}
        mean = "perplexity" if self.options.table == 1 else "window_mean_perplexity"
        for window in WINDOWS:
            yield results.get(self.tokens(window), {}).get(mean)

    table_2 = table_1

    def table_3(self, row: Row) -> Iterator[float | None]:
        """Perplexity by step, from the log of the run."""
        yield from self.logged(row, f"perplexity/{self.tokens(row.window)}")

    def table_4(self, row: Row) -> Iterator[float | None]:
        """k_max by step, from the log of the run."""
        yield from self.logged(row, f"passkey/{512 if self.options.smoke else row.window}")

    def logged(self, row: Row, name: str) -> Iterator[float | None]:
        """A metric at the steps of the paper; in miniature, at the first ones that there are."""
        log = pathlib.Path(self.path(row)) / "metrics.jsonl"
        lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        found = {line["step"]: line[name] for line in lines if name in line}
        if lines and not found:
            raise InputError(
                f"{log} has no {name}: the run was trained for a table that does not need it. Train it again for this "
                "table in another --output"
            )
        if self.options.smoke:
            found = dict(zip(STEPS, found.values(), strict=False))
        for step in STEPS:
            yield found.get(step)

    def table_5(self, row: Row) -> Iterator[float | None]:
        """Accuracies of the harness."""
        file = self.output / "results" / f"{row.name}-table5.json"
        self.run(
            file, "evaluate", "harness", "--model", self.path(row), "--tasks", *self.options.tasks, "--output", file
        )
        results = self.read(file)["results"] if file.exists() else {}
        for task in TASKS:
            metrics = results.get(task, {})
            name = next((m for m in metrics if m.startswith("acc") and not m.endswith("_stderr")), None)
            yield 100 * metrics[name] if name else None

    def table_6(self, row: Row) -> Iterator[float | None]:
        """Fine-tunes the extended model on GovReport for 10 epochs, on the summaries only, and scores its summaries."""
        run = f"{self.output}/{row.name}-govreport"
        if not self.options.govreport:
            raise InputError("table 6 needs --govreport: a folder with train.jsonl and test.jsonl")
        data = pathlib.Path(self.options.govreport)
        store = self.output / "govreport"
        words = ["--text-field", "summary", "--prompt-field", "report", "--prompt-template", "summarize"]
        words += ["--max-prompt-tokens", 15000, "--max-text-tokens", 1000, "--window", self.tokens(row.window)]
        tokenizer = f"{self.path(row)}/model"
        self.run(
            store / "manifest.json",
            *("prepare", "--input", data / "train.jsonl", "--tokenizer", tokenizer, "--output", store, *words),
        )
        steps = 4 if self.options.smoke else 1364  # 10 epochs of 17,457 documents, 128 at a time
        words = ["--rope.kind", "default", "--rope.factor", 1, "--data.sources", store, "--data.packing", "document"]
        words += ["--data.mask-prompts", "--data.no-require-long-documents"]
        words += ["--train.init-from", self.path(row), "--train.steps", steps, "--train.output", run]
        smoke = ("--smoke",) if self.options.smoke else ()
        self.run(f"{run}/result.json", "train", "--config", row.config, *smoke, *words)
        file = self.output / "results" / f"{row.name}-table6.json"
        words = ["--documents", 2, "--max-input", 200, "--max-new-tokens", 20] if self.options.smoke else []
        command = ("evaluate", "summarization", "--model", run, "--data", data / "test.jsonl", *words, "--output", file)
        self.run(file, *command)
        results = self.read(file)["results"] if file.exists() else {}
        for name in ROUGE:
            yield 100 * results[name]["f"] if name in results else None

    @staticmethod
    def read(file: pathlib.Path) -> dict:
        """A result file."""
        return json.loads(file.read_text())

    def write(self) -> None:
        """Prints the table and writes it as Markdown."""
        heads = ["model", *map(str, HEADS[self.options.table])]
        lines = [f"{TITLES[self.options.table]}; ours / paper", "", "| " + " | ".join(heads) + " |"]
        lines.append("| --- |" + " ---: |" * (len(heads) - 1))
        for row in self.rows:
            cells = [_cell(a, b) for a, b in zip(self.ours(row), row.paper, strict=True)]
            lines.append("| " + " | ".join([row.name, *cells]) + " |")
        if self.options.smoke:
            lines += ["", "Made with the built-in tiny model: the numbers have no meaning beside the paper's."]
        text = "\n".join(lines)
        print(f"\n{text}")
        if not self.options.dry_run:
            self.output.mkdir(parents=True, exist_ok=True)
            (self.output / f"table{self.options.table}.md").write_text(text + "\n")


def _cell(ours: float | None, paper: float | str | None) -> str:
    return f"{_number(ours)} / {_number(paper)}" if ours is not None or paper is not None else "-"


def _number(value: float | str | None) -> str:
    if value is None or isinstance(value, str):
        return value or "-"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.2f}"


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    cli.run(lambda: Table(tyro.cli(Options, args=argv)).write())


if __name__ == "__main__":
    main()
