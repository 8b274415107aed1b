"""The content of a report (tables, figures and notes), and its conversion to HTML and Markdown."""

import dataclasses
import html
from collections.abc import Sequence

Cell = str | float | int | None


@dataclasses.dataclass(frozen=True)
class Table:
    """A table. The first column is text; the others are numbers or text."""

    heads: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    best: str = ""
    """Whether the best number of each column, which is set in bold, is the 'low'est or 'high'est; empty: none."""
    digits: int = 2
    """Decimal places."""

    def shown(self) -> list[list[tuple[str, bool]]]:
        """Returns the text of each cell, and whether it is the best of its column."""
        best = {}
        for i in range(1, len(self.heads)):
            numbers = [row[i] for row in self.rows if isinstance(row[i], float)]
            if self.best and len(numbers) > 1:
                best[i] = self._text({"low": min, "high": max}[self.best](numbers))
        texts = [[self._text(cell) for cell in row] for row in self.rows]
        return [[(text, best.get(i) == text) for i, text in enumerate(row)] for row in texts]

    def _text(self, cell: Cell) -> str:
        if cell is None:
            return "-"
        if isinstance(cell, float):
            return (
                f"{cell:.{self.digits}f}" if abs(cell) < 1000 else f"{cell:,.0f}" if abs(cell) < 1e6 else f"{cell:.1e}"
            )
        return f"{cell:,}" if isinstance(cell, int) else cell


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure as SVG, with a caption."""

    svg: str
    caption: str


@dataclasses.dataclass(frozen=True)
class Section:
    """A section of a report: tables and figures, and the protocol of the measurements."""

    title: str
    parts: Sequence[Table | Figure]
    protocol: Sequence[str]
    """Lines that describe the protocol."""
    lead: str = ""
    """Introductory paragraph."""


def to_markdown(title: str, sections: Sequence[Section]) -> str:
    """Converts a report to Markdown, without its figures."""
    lines = [f"# {title}"]
    for section in sections:
        lines += ["", f"## {section.title}", ""]
        lines += [section.lead, ""] if section.lead else []
        for part in section.parts:
            if isinstance(part, Figure):
                continue
            if part.caption:
                lines += [f"**{part.caption}**", ""]
            rows = [list(part.heads), ["---"] + ["---:"] * (len(part.heads) - 1)]
            rows += [[f"**{text}**" if best else text for text, best in row] for row in part.shown()]
            lines += ["| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in rows] + [""]
        lines += [f"- {line}" for line in section.protocol]
    return "\n".join(lines) + "\n"


def to_html(title: str, sections: Sequence[Section]) -> str:
    """Converts a report to a self-contained HTML page."""
    links = "".join(f'<a href="#s{i}">{_escape(s.title)}</a>' for i, s in enumerate(sections))
    body = "\n".join(_section(i, section) for i, section in enumerate(sections))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{_STYLE}</style></head><body><main>\n<h1>{_escape(title)}</h1>\n<nav>{links}</nav>\n{body}\n"
        "</main></body></html>\n"
    )


def _section(number: int, section: Section) -> str:
    lead = f"<p>{_escape(section.lead)}</p>" if section.lead else ""
    parts = "\n".join(_figure(p) if isinstance(p, Figure) else _table(p) for p in section.parts)
    protocol = "".join(f"<li>{_escape(line)}</li>" for line in section.protocol)
    protocol = f'<div class="protocol"><b>Protocol</b><ul>{protocol}</ul></div>' if protocol else ""
    return f'<section id="s{number}"><h2>{_escape(section.title)}</h2>{lead}\n{parts}\n{protocol}</section>'


def _figure(figure: Figure) -> str:
    return f"<figure>{figure.svg}<figcaption>{_escape(figure.caption)}</figcaption></figure>"


def _table(table: Table) -> str:
    heads = "".join(f"<th>{_escape(h)}</th>" for h in table.heads)
    rows = "".join(
        "<tr>" + "".join(f"<td>{f'<b>{_escape(t)}</b>' if best else _escape(t)}</td>" for t, best in row) + "</tr>\n"
        for row in table.shown()
    )
    caption = f"<caption>{_escape(table.caption)}</caption>" if table.caption else ""
    return f'<div class="wide"><table>{caption}<thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'


def _escape(text: str) -> str:
    return html.escape(text)


_STYLE = """
body { margin: 0; background: #fff; color: #1c2126; font: 16px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 24px 28px 80px; }
h1 { font-size: 28px; margin: 8px 0 12px; } h2 { font-size: 21px; margin: 44px 0 10px; }
nav a { display: inline-block; margin: 0 18px 6px 0; color: #1a5fb4; text-decoration: none; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 14px 0 20px; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding-bottom: 6px; white-space: nowrap; }
th, td { padding: 5px 14px; text-align: right; border-bottom: 1px solid #e3e6ea; white-space: nowrap; }
th { border-bottom: 2px solid #9aa3ad; font-weight: 600; } th:first-child, td:first-child { text-align: left; }
tbody tr:hover { background: #f4f7fa; } figure { margin: 18px 0 26px; } figure svg { max-width: 100%; height: auto; }
figcaption, .protocol { color: #4a545e; font-size: 14px; }
.protocol { border-left: 3px solid #c9d1d9; padding: 2px 14px; }
.protocol ul { margin: 4px 0; padding-left: 20px; }
"""
