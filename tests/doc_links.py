"""What the pages of the docs point to: files, headings, and lines of code by the name that begins there.

A link to code has the name in its text and the line in its address: [`Rescale.factor`](../PATH.py#L41). Lines
move; this writes the right numbers into all pages:

    python tests/doc_links.py
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]

LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)")
PICTURE = re.compile(r"!\[[^\]]*\]\((?P<target>[^)\s]+)\)")
LINE = re.compile(r"L(?P<line>\d+)")
CODE_BLOCK = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#+ (?P<text>.*)$", re.MULTILINE)


class Link(NamedTuple):
    """One link of a page."""

    page: Path
    text: str
    path: Path  # of the file, or of the page itself
    anchor: str  # behind the "#", or ""


def links(page: Path) -> list[Link]:
    """Those that stay in the repository, pictures included."""
    content = CODE_BLOCK.sub("", page.read_text(encoding="utf-8"))
    found = [(match["text"], match["target"]) for match in LINK.finditer(content)]
    found += [("", match["target"]) for match in PICTURE.finditer(content)]
    result = []
    for text, target in found:
        if "://" in target or target.startswith("mailto:"):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        result.append(Link(page, text, path, anchor))
    return result


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    content = CODE_BLOCK.sub("", page.read_text(encoding="utf-8"))
    return {slug(match["text"]) for match in HEADING.finditer(content)}


def slug(heading: str) -> str:
    """A heading as GitHub writes it into an address."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def line_of(path: Path, name: str) -> int | None:
    """Where `name` begins in a Python file; None: nowhere.

    A function, a class, what a line assigns to, or one of these in a class: `Class.method`.
    """
    nodes: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    for part in name.split("."):
        inside = [child for node in nodes for child in ast.iter_child_nodes(node)]
        nodes = [child for child in inside if part in names_of(child)]
    return nodes[0].lineno if nodes else None


def names_of(node: ast.AST) -> set[str]:
    """What a statement gives a name to."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Assign):
        return {target.id for target in node.targets if isinstance(target, ast.Name)}
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return {node.target.id}
    return set()


def name_in(text: str) -> str:
    """The name in the text of a link to code."""
    return text.strip("`").removesuffix("()")


def correct(page: Path) -> int:
    """Writes the right lines into a page; how many were wrong."""
    wrong = 0

    def with_right_line(match: re.Match) -> str:
        nonlocal wrong
        file, _, anchor = match["target"].partition("#")
        if not LINE.fullmatch(anchor):
            return match[0]
        line = line_of((page.parent / file).resolve(), name_in(match["text"]))
        if line is None or anchor == f"L{line}":
            return match[0]
        wrong += 1
        return f"[{match['text']}]({file}#L{line})"

    content = page.read_text(encoding="utf-8")
    corrected = LINK.sub(with_right_line, content)
    if wrong:
        page.write_text(corrected, encoding="utf-8")
    return wrong


if __name__ == "__main__":
    for each in PAGES:
        if changed := correct(each):
            print(f"{each.relative_to(ROOT)}: {changed} lines corrected")
