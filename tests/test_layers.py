"""Imports point one way, wherever in a file they stand; only those for type checkers alone may point upward."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import guerdon

PACKAGE = Path(guerdon.__file__).parent
LAYERS = [
    {"errors", "lazy", "fields", "plugins", "__init__"},
    {"feedback", "exact"},
    {"language", "control", "llm"},
    {"training", "tasks", "rewards"},
    {"methods"},
    {"evaluation"},
    {"claims", "papers", "report"},
    {"cli", "ui", "api", "chains", "exporting", "recipes", "runs", "__main__"},
]
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, part of guerdon) of every import, but those under `if TYPE_CHECKING:`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "guerdon":
                yield node.lineno, parts[1] if len(parts) > 1 and parts[1] in LEVEL else "__init__"
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"line {node.lineno}: relative import"
        yield from imported(node)


def upward(path: Path) -> list[str]:
    here = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [
        f"{path.relative_to(PACKAGE)}:{line}: {here} imports {part}"
        for line, part in imported(tree)
        if LEVEL[part] > LEVEL[here]
    ]


def test_every_part_has_a_layer():
    parts = {path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert parts - {"__pycache__"} <= set(LEVEL)


def test_imports_point_downward():
    wrong = [line for path in sorted(PACKAGE.rglob("*.py")) for line in upward(path)]
    assert not wrong, "\n".join(wrong)


def test_packages_are_complete():
    """A directory without `__init__.py` would be left out of what is installed by some tools."""
    missing = {p.parent for p in PACKAGE.rglob("*.py") if not (p.parent / "__init__.py").exists()}
    assert not missing


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from guerdon.cli import main", [(1, "cli")]),
        ("def f():\n    import guerdon.methods.base", [(2, "methods")]),
        ("from guerdon import api, __version__", [(1, "api"), (1, "__init__")]),
        ("if TYPE_CHECKING:\n    import guerdon.cli\nelse:\n    pass", []),
        ("import numpy, os.path", []),
    ],
)
def test_the_checker_sees_nested_imports(source: str, found: list[tuple[int, str]]):
    assert list(imported(ast.parse(source))) == found
