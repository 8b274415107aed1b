"""The command: result files in, `FILE.html` and `FILE.md` out."""

import dataclasses
import pathlib
from collections.abc import Sequence

import tyro

from pi_jax import cli
from pi_jax.errors import InputError
from pi_jax.evaluate.report.gather import gather
from pi_jax.evaluate.report.page import to_html, to_markdown
from pi_jax.evaluate.report.sections import build


@dataclasses.dataclass(frozen=True)
class Report:
    """One page from the result files of several models, side by side: tables in the paper's shape, curves, heat maps.

    For example: --inputs 'original=r/base-*.json' 'interpolated=r/untuned-*.json' 'tuned=r/tuned-*.json' runs=..."""

    inputs: tuple[str, ...]
    """LABEL=PATH: what a model is called in the report, and a result file, a metrics.jsonl, a glob or a folder of them.
    A label may come more than once; rows stand in the order of the labels."""
    output: str
    """HTML file to write; the same in Markdown, without the figures, goes beside it with the ending .md."""
    title: str = "Long-context evaluation"
    """Heading of the page."""

    def __post_init__(self):
        if not self.inputs:
            raise InputError("--inputs is empty: it needs at least one LABEL=PATH")
        if not self.output.endswith(".html"):
            raise InputError(f"--output is {self.output}: its ending must be .html")


def report(args: Report) -> None:
    """Runs the command."""
    cli.require_writable(args.output)
    sections = build(gather(args.inputs))
    page = pathlib.Path(args.output)
    for file, text in (
        (page, to_html(args.title, sections)),
        (page.with_suffix(".md"), to_markdown(args.title, sections)),
    ):
        with cli.new_file(file) as temporary:
            temporary.write_text(text)
    print(f"{len(sections)} sections in {page} and {page.with_suffix('.md')}")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    cli.run(lambda: report(tyro.cli(Report, prog="python -m pi_jax.evaluate report", args=argv)))
