"""Answers worked out again, slowly, from the words of a question and the list of what stands where."""

import re

from litchi.envs.scene import Scene

BALLS = {"balls": "ball", "keys": "key", "boxes": "box"}
TOWARDS = {"above": (-1, 0), "below": (1, 0), "left": (0, -1), "right": (0, 1)}
AHEAD = {"up": "above", "down": "below", "left": "left", "right": "right"}
NAME = r"(?:red|green|blue|purple|yellow|grey) (?:ball|key|box)"


def answer(scene: Scene, question: str, before: list[tuple[str, str]]) -> str:
    """The answer to a question after earlier (question, answer) pairs."""
    text = question.lower()
    table = {(t.row, t.column): t.name for t in scene.things}
    row, column, direction = scene.agent
    names = re.findall(NAME, text)
    side = re.search(r"above|below|left|right", text)
    if text in ("where is it?", "and where is it?"):
        names = [said_last(before[-1])]
    if "facing" in text or "direction" in text or "looking" in text:
        return direction
    if "front of the agent" in text or text == "what does the agent face?":
        return looked_at(table, (row, column), neighbour((row, column), AHEAD[direction]))
    if "directly" in text:
        if not names:
            names = [last_subject(before)]
        return looked_at(table, (row, column), neighbour(cell_of(table, names[0]), side.group()))
    if "closer" in text or "nearer" in text:
        steps = [abs(r - row) + abs(c - column) for r, c in (cell_of(table, name) for name in names)]
        assert steps[0] != steps[1]
        return f"the {names[0] if steps[0] < steps[1] else names[1]}"
    if len(names) == 2:
        (r1, c1), (r2, c2) = (cell_of(table, name) for name in names)
        return "yes" if {"above": r1 < r2, "below": r1 > r2, "left": c1 < c2, "right": c1 > c2}[side.group()] else "no"
    if plural := re.search(r"balls|keys|boxes", text):
        return str(sum(name.endswith(BALLS[plural.group()]) for name in table.values()))
    if "colour" in text or re.fullmatch(r"and the (ball|key|box)\?", text):
        kind = re.search(r"ball|key|box", text).group()
        (found,) = [name for name in table.values() if name.endswith(kind)]
        return found.split()[0]
    if re.search(rf"(is there|do you see|have|and) a {NAME}", text):
        return "yes" if names[0] in table.values() else "no"
    at = (row, column) if "the agent" in text else cell_of(table, names[0])
    return f"row {at[0]}, column {at[1]}"


def said_last(turn: tuple[str, str]) -> str:
    """The thing a pronoun means: in the answer, or else in the question."""
    return (re.findall(NAME, turn[1].lower()) or re.findall(NAME, turn[0].lower()))[0]


def last_subject(before: list[tuple[str, str]]) -> str:
    return next(found[0] for question, _ in reversed(before) if (found := re.findall(NAME, question.lower())))


def cell_of(table: dict, name: str) -> tuple[int, int]:
    """Raises ValueError if the name does not single a thing out."""
    (cell,) = [cell for cell, found in table.items() if found == name]
    return cell


def neighbour(cell: tuple[int, int], side: str) -> tuple[int, int]:
    return cell[0] + TOWARDS[side][0], cell[1] + TOWARDS[side][1]


def looked_at(table: dict, agent: tuple[int, int], cell: tuple[int, int]) -> str:
    if cell == agent:
        return "the agent"
    if not (1 <= cell[0] <= 6 and 1 <= cell[1] <= 6):
        return "a wall"
    return f"a {table[cell]}" if cell in table else "nothing"
