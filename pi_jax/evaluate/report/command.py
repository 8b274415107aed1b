"""`python -m pi_jax.evaluate report`: reads result files and writes `FILE.html` and `FILE.md`."""

import dataclasses
import pathlib
from collections.abc import Sequence

import tyro

from pi_jax import atomic, cli
from pi_jax.errors import InputError
from pi_jax.evaluate.report.gather import gather
from pi_jax.evaluate.report.page import to_html, to_markdown
from pi_jax.evaluate.report.sections import build


@dataclasses.dataclass(frozen=True)
class Report:
    """Create one page that compares several models: tables like those of the paper, curves and heat maps.

    For example: --inputs 'original=r/base-*.json' 'interpolated=r/untuned-*.json' 'tuned=r/tuned-*.json' runs=..."""

    inputs: tuple[str, ...]
    """LABEL=PATH: the name of a model in the report, and a result file, a metrics.jsonl, a glob or a folder of them.
    A label may be repeated; table rows are in the order of the labels."""
    output: str
    """HTML file to write. The same content in Markdown, without the figures, is written next to it with the extension
    .md."""
    title: str = "Long-context evaluation"
    """Heading of the page."""

    def __post_init__(self):
        if not self.inputs:
            raise InputError("--inputs is empty: it needs at least one LABEL=PATH")
        if not self.output.endswith(".html"):
            raise InputError(f"--output is {self.output}: its extension must be .html")


def report(args: Report) -> None:
    """Runs the command."""
    page = pathlib.Path(args.output)
    markdown = page.with_suffix(".md")
    for file in (page, markdown):
        atomic.require_writable(str(file))
    sections = build(gather(args.inputs))
    for file, text in ((page, to_html(args.title, sections)), (markdown, to_markdown(args.title, sections))):
        with atomic.new_file(file) as temporary:
            temporary.write_text(text)
    print(f"{len(sections)} sections in {page} and {markdown}")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command with the arguments of the command line."""
    cli.run(lambda: report(tyro.cli(Report, prog="python -m pi_jax.evaluate report", args=argv)))
