"""What is small can be read: limits on files, classes and functions."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tests.house.sources import place, python_files, tree

FILE, CLASS, FUNCTION, LONG_FUNCTION = 600, 250, 60, 100
LONG_SHARE = 0.01
"""Of all functions, those that may have up to LONG_FUNCTION lines."""


def lengths(*kinds: type[ast.stmt]) -> Iterator[tuple[int, str]]:
    """(lines, place) of every definition in what we ship."""
    for path in python_files("src", "recipes"):
        for node in ast.walk(tree(path)):
            if isinstance(node, kinds):
                assert node.end_lineno is not None
                yield node.end_lineno - node.lineno + 1, place(path, node.lineno)


def test_files_are_short():
    files = python_files("src", "recipes", "tests", "bench")
    long = {place(p): n for p in files if (n := len(p.read_text(encoding="utf-8").splitlines())) > FILE}
    assert not long, f"over {FILE} lines: {long}"


def test_classes_are_short():
    long = {where: n for n, where in lengths(ast.ClassDef) if n > CLASS}
    assert not long, f"over {CLASS} lines: {long}"


def test_functions_are_short():
    functions = list(lengths(ast.FunctionDef, ast.AsyncFunctionDef))
    long = {where: n for n, where in functions if n > FUNCTION}
    allowed = int(LONG_SHARE * len(functions))
    assert len(long) <= allowed, f"{len(functions)} functions, {allowed} may be over {FUNCTION} lines: {long}"
    assert max((n for n, _ in functions), default=0) <= LONG_FUNCTION, f"over {LONG_FUNCTION} lines: {long}"
