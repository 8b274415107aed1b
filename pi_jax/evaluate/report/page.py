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
class Claims:
    """Statements that were checked: text, the evidence, and whether each holds."""

    items: Sequence[tuple[str, str, bool]]


@dataclasses.dataclass(frozen=True)
class Section:
    """A section of a report: tables and figures, and the protocol of the measurements."""

    title: str
    parts: Sequence[Table | Figure | Claims]
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
            if isinstance(part, Claims):
                lines += [f"- {'holds' if holds else 'does NOT hold'}: {c}: {e}" for c, e, holds in part.items] + [""]
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
    lead = f'<p class="lead">{_escape(section.lead)}</p>' if section.lead else ""
    make = {Figure: _figure, Table: _table, Claims: _claims}
    parts = "\n".join(make[type(part)](part) for part in section.parts)
    protocol = "".join(f"<li>{_escape(line)}</li>" for line in section.protocol)
    protocol = f'<div class="protocol"><b>Protocol</b><ul>{protocol}</ul></div>' if protocol else ""
    return f'<section id="s{number}"><h2>{_escape(section.title)}</h2>{lead}\n{parts}\n{protocol}</section>'


def _claims(claims: Claims) -> str:
    items = "".join(
        f'<li class="{"yes" if holds else "no"}"><b>{_escape(claim)}</b>{_escape(evidence)}</li>'
        for claim, evidence, holds in claims.items
    )
    return f'<ul class="claims">{items}</ul>'


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
:root { color-scheme: light dark; --back: #fff; --text: #1c2126; --soft: #4a545e; --line: #e3e6ea; --rule: #9aa3ad;
  --hover: #f4f7fa; --link: #1a5fb4; --yes: #1b7f3b; --no: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --back: #14181c; --text: #e4e8ec; --soft: #a3adb7; --line: #2a3138; --rule: #5b6671; --hover: #1d232a;
    --link: #7ab7ff; --yes: #6fd38c; --no: #ff8a80; }
  figure svg { filter: invert(0.91) hue-rotate(180deg); }
}
body { margin: 0; background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 24px 28px 80px; }
h1 { font-size: 28px; margin: 8px 0 12px; } h2 { font-size: 21px; margin: 44px 0 10px; }
nav a { display: inline-block; margin: 0 18px 6px 0; color: var(--link); text-decoration: none; }
.wide, figure { overflow-x: auto; }
table { border-collapse: collapse; margin: 14px 0 20px; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding-bottom: 6px; white-space: nowrap; }
th, td { padding: 5px 14px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { border-bottom: 2px solid var(--rule); font-weight: 600; } th:first-child, td:first-child { text-align: left; }
tbody tr:hover { background: var(--hover); } figure { margin: 18px 0 26px; }
figure svg { max-width: 100%; min-width: 620px; height: auto; }
figcaption, .protocol { color: var(--soft); font-size: 14px; }
.protocol { border-left: 3px solid var(--rule); padding: 2px 14px; }
.protocol ul { margin: 4px 0; padding-left: 20px; }
.lead { font-size: 18px; }
.claims { list-style: none; padding: 0; }
.claims li { border-left: 4px solid var(--rule); padding: 4px 14px; margin: 12px 0; }
.claims .yes { border-color: var(--yes); } .claims .no { border-color: var(--no); }
.claims b { display: block; }
.claims .yes b::before { content: "\\2713  "; color: var(--yes); }
.claims .no b::before { content: "\\2717  "; color: var(--no); }
@media (max-width: 600px) { main { padding: 12px 14px 60px; } h1 { font-size: 23px; } .lead { font-size: 17px; } }
"""
