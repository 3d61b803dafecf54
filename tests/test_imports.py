"""Imports run one way (docs/architecture.md), and importing the package is cheap."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "fastunlearn"
# The rooms, lower ones first: a file imports only from lines above that of its own room, or from its own
# room.
LAYERS = [
    {"host", "assets", "kernels"},
    {"objective"},
    {"reference", "ops"},
    {"functional"},
    {"methods"},
    {"step"},
    {"data"},
    {"neighbors", "models"},
    {"engine", "recipes", "metrics"},
    {"runs", "report"},
    {"measuring"},
    {"demo", "testing"},
    {"cli"},
    {"__main__"},
]
HEIGHT = {name: height for height, layer in enumerate(LAYERS) for name in layer}


def room_of(path: Path) -> str:
    """The module or subpackage of the package that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path):
    depth = len(path.relative_to(PACKAGE).parts)  # 1: directly in the package
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            yield from [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]
        elif (
            isinstance(node, ast.ImportFrom)
            and node.level == 0
            and (node.module or "").split(".")[0] == "fastunlearn"
        ):
            yield from node.module.split(".")[1:2] or [alias.name for alias in node.names]


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    own = room_of(path)
    assert own in HEIGHT, (
        f"{own} has no line: give it one in tests/test_imports.py and in docs/architecture.md"
    )
    upward = {
        name
        for name in imported_rooms(path)
        if name in HEIGHT and name != own and HEIGHT[name] >= HEIGHT[own]
    }
    beside = {name for name in upward if HEIGHT[name] == HEIGHT[own]}
    assert not upward - beside, f"{own} imports from above: {sorted(upward - beside)}"


def test_no_two_rooms_import_each_other():
    """Nor do those on one line, which the test above lets import from one another."""
    arrows = {(room_of(path), name) for path in FILES for name in imported_rooms(path) if name in HEIGHT}
    both_ways = {(one, other) for one, other in arrows if one < other and (other, one) in arrows}
    assert not both_ways, f"import each other: {sorted(both_ways)}"


def test_reference_stands_at_the_bottom():
    for path in (PACKAGE / "reference").glob("*.py"):
        assert set(imported_rooms(path)) <= {"objective"}, path.name


def test_ops_do_not_know_the_reference():
    for path in (PACKAGE / "ops").glob("*.py"):
        assert "reference" not in set(imported_rooms(path)), path.name


def test_import_is_light():
    heavy = (
        "triton",
        "diffusers",
        "transformers",
        "matplotlib",
        "torchmetrics",
        "torchdiffeq",
        "scipy",
        "accelerate",
        "datasets",
        "nvtx",
        "tyro",
    )
    code = f"import fastunlearn, sys; print([name for name in {heavy!r} if name in sys.modules])"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )
