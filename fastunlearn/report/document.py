"""A report as one HTML page without network, legible in light and dark and on paper.

It holds text, tables and pictures, which are embedded.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..host.atomic import atomic_file
from .verdict import Criterion, all_passed

# Colours are variables, set twice: for light pages and for dark ones. Nothing is loaded from elsewhere.
STYLE = """
:root { color-scheme: light dark;
  --ink: #1c2024; --soft: #5b636d; --line: #dfe3e8; --page: #ffffff; --band: #f6f7f9;
  --good: #1a7f4b; --bad: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8eaed; --soft: #a2aab4; --line: #343a42; --page: #15181c; --band: #1d2126;
    --good: #5fc58d; --bad: #f2857b; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 3rem 1.5rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.25; margin: 0 0 .5rem; letter-spacing: -.01em; }
h2 { font-size: 1.25rem; margin: 2.75rem 0 .6rem; }
p { margin: .5rem 0; max-width: 46rem; }
.lead { color: var(--soft); font-size: 1.05rem; }
.verdict { max-width: none; margin: 1.75rem 0 0; padding: .9rem 1.1rem; border: 1px solid var(--line);
  border-left: 5px solid var(--soft); border-radius: 4px; background: var(--band); font-weight: 600; }
.verdict.passed { border-left-color: var(--good); }
.verdict.failed { border-left-color: var(--bad); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; margin: .9rem 0; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .5rem .9rem .5rem 0;
  border-bottom: 1px solid var(--line); }
th { font-size: .85rem; font-weight: 600; color: var(--soft); border-bottom-width: 2px; }
td + td.number, th + th.number { text-align: right; white-space: nowrap;
  padding-right: 0; padding-left: 1.2rem; }
.criteria td:first-child { min-width: 15rem; }
.answer { font-weight: 600; white-space: nowrap; }
.passed .answer { color: var(--good); }
.failed .answer { color: var(--bad); }
.evidence, .note { color: var(--soft); font-size: .92rem; }
figure { margin: 1rem 0 1.5rem; }
figure img { display: block; max-width: 100%; height: auto; border-radius: 4px; }
figcaption { color: var(--soft); font-size: .92rem; margin-top: .5rem; max-width: 46rem; }
.heads { display: flex; padding-left: 4px; font-size: .85rem; font-weight: 600; color: var(--soft);
  margin-bottom: .3rem; }
.heads span { flex: 1; }
.heads.pair { gap: 1.6rem; }
@media (max-width: 42rem) {
  .criteria tr { display: block; padding: .6rem 0; border-bottom: 1px solid var(--line); }
  .criteria tr:first-child { display: none; }
  .criteria td { display: block; border: 0; padding: .1rem 0; }
  td + td.number { white-space: normal; }
}
footer { margin-top: 3rem; padding-top: .8rem; border-top: 1px solid var(--line); color: var(--soft);
  font-size: .85rem; }
@media print {
  main { padding: 0; max-width: none; }
  figure, tr { break-inside: avoid; }
  h2 { break-after: avoid; }
}
"""


@dataclass(frozen=True)
class Figure:
    """A picture, on the page and as a file beside it."""

    file: str  # its name in the folder
    png: bytes
    caption: str
    heads: tuple[str, ...] = ()  # written above equal parts of its width
    width: int = 912  # pixels on the page


@dataclass(frozen=True)
class Table:
    """Text cells; the first column names the row, the others are aligned as numbers."""

    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the page under a title of its own."""

    title: str
    text: str = ""
    table: Table | None = None
    figures: tuple[Figure, ...] = ()


@dataclass(frozen=True)
class Report:
    """What `write` turns into `report.html`, `results.json` and one PNG a figure.

    `passed` is the answer of all criteria: None, which the page does not paint green, where none of them asks
    what was kept.
    """

    title: str
    lead: str
    sections: Sequence[Section]
    results: dict
    verdict: str = ""
    criteria: Sequence[Criterion] = ()
    footer: str = ""
    passed: bool | None = field(init=False)

    def __post_init__(self):
        # A frozen dataclass takes no assignment, not even that of an answer that follows from its criteria.
        object.__setattr__(self, "passed", all_passed(self.criteria))

    def write(self, folder: Path) -> Path:
        """Writes the files into `folder`, each replaced at once, and returns the path of the page.

        Raises:
            ValueError: `results` has NaN or Inf, which JSON has not; nothing is written.
        """
        # JSON first: what it refuses is refused before any file is written.
        results = (json.dumps(self.results, indent=1, allow_nan=False) + "\n").encode()
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for section in self.sections:
            for figure in section.figures:
                _write(folder / figure.file, figure.png)
        # The page last: where it is, the files that belong to it are, too.
        _write(folder / "results.json", results)
        _write(folder / "report.html", self.html().encode())
        return folder / "report.html"

    def html(self) -> str:
        """The page."""
        text = html.escape
        body = [f"<h1>{text(self.title)}</h1>", f'<p class="lead">{text(self.lead)}</p>']
        if self.verdict:
            body.append(f'<p class="verdict {_state(self.passed)}">{text(self.verdict)}</p>')
        if self.criteria:
            body.append(_criteria(self.criteria))
        body += map(_section, self.sections)
        if self.footer:
            body.append(f"<footer>{text(self.footer)}</footer>")
        lines = [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{text(self.title)}</title>",
            f"<style>{STYLE}</style>",
            "</head>",
            "<body>",
            "<main>",
            *body,
            "</main>",
            "</body>",
            "</html>",
        ]
        return "\n".join(lines) + "\n"


def _state(passed: bool | None) -> str:
    """The class of an element: the style sheet paints what passed green, and what failed red."""
    if passed is None:
        return ""
    return "passed" if passed else "failed"


def _criteria(criteria: Sequence[Criterion]) -> str:
    """The questions as a table, each with its answer and evidence."""
    rows = ["<tr><th>question</th><th>answer</th><th>evidence</th></tr>"]
    for criterion in criteria:
        answer = "✓ yes" if criterion.passed else "✗ no"
        rows.append(
            f'<tr class="{_state(criterion.passed)}"><td>{html.escape(criterion.name)}</td>'
            f'<td class="answer">{answer}</td>'
            f'<td class="evidence">{html.escape(criterion.evidence)}</td></tr>'
        )
    table = "\n".join(rows)
    return f'<h2>What was decided</h2>\n<div class="scroll"><table class="criteria">{table}\n</table></div>'


def _section(section: Section) -> str:
    parts = [f"<h2>{html.escape(section.title)}</h2>"]
    if section.text:
        parts.append(f"<p>{html.escape(section.text)}</p>")
    if section.table is not None:
        parts.append(_table(section.table))
    parts += map(_figure, section.figures)
    return "\n".join(parts)


def _table(table: Table) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        name, *numbers = map(html.escape, cells)
        columns = [f"<{tag}>{name}</{tag}>"]
        columns += [f"<{tag} class=number>{number}</{tag}>" for number in numbers]
        return f"<tr>{''.join(columns)}</tr>"

    rows = "\n".join(row(cells, "td") for cells in table.rows)
    note = f'<p class="note">{html.escape(table.note)}</p>' if table.note else ""
    return f'<div class="scroll"><table>{row(table.columns, "th")}\n{rows}\n</table></div>{note}'


def _figure(figure: Figure) -> str:
    heads = ""
    if figure.heads:
        # Two heads stand above two grids, which have a gutter between them.
        kind = "heads pair" if len(figure.heads) == 2 else "heads"
        spans = "".join(f"<span>{html.escape(head)}</span>" for head in figure.heads)
        heads = f'<div class="{kind}" style="max-width: {figure.width}px">{spans}</div>'
    caption = html.escape(figure.caption)
    source = f"data:image/png;base64,{base64.b64encode(figure.png).decode()}"
    image = f'<img alt="{caption}" width="{figure.width}" src="{source}">'
    return f"<figure>{heads}{image}<figcaption>{caption}</figcaption></figure>"


def _write(path: Path, content: bytes) -> None:
    with atomic_file(path) as file:
        file.write(content)
