"""A file is named after its idea and says it first; nothing is found through a registry."""

from __future__ import annotations

import ast
import re

from tests.house.sources import ROOT, place, python_files, tracked, tree

NAMELESS = {"utils", "util", "helpers", "helper", "common", "misc"}
SENTENCE_END = re.compile(r"[.!?](?=\s+[A-Z])")


def test_no_file_is_a_drawer():
    drawers = [p for p in tracked() if p.suffix == ".py" and {p.stem, p.parent.name} & NAMELESS]
    assert not drawers, f"name the noun that these hold: {list(map(place, drawers))}"


def test_every_file_opens_with_one_sentence():
    wrong = []
    for path in python_files("src", "recipes", "bench"):
        if source := path.read_text(encoding="utf-8").strip():
            first = (ast.get_docstring(ast.parse(source)) or "").split("\n\n")[0]
            if not first.endswith((".", ":", "?")) or SENTENCE_END.search(first):
                wrong.append(place(path))
    assert not wrong, f"the first paragraph of these is not one sentence that states the idea: {wrong}"


def test_nothing_registers_itself():
    found = [
        place(path, node.lineno)
        for path in python_files("src", "recipes")
        for node in ast.walk(tree(path))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        for decorator in node.decorator_list
        if "register" in ast.unparse(decorator)
    ]
    assert not found, f"use a closed union and match, or one dict: {found}"


def test_no_private_path_is_named():
    private = "/" + "work/"
    found = []
    for path in tracked():
        data = path.read_bytes()
        if b"\0" not in data and private.encode() in data:
            found.append(place(path))
    assert not found, f"{private} is one machine's path: {found}"


def test_the_licence_is_whole():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "END OF TERMS AND CONDITIONS" in text
