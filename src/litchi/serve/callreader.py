"""Finds calls in what a model says, piece by piece: nothing is told before it is certain, and all of it at once then.

A call has begun when its tool is named and its arguments are opened; from there it stays a call, whatever becomes of
it, and its arguments go out as the model writes them. So a stream and the answer given whole are the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from litchi.serve.calls import CLOSE, NAME, OPEN, Call, Toolbox

BLANKS = " \t\r\n"
HEAD = re.compile(
    rf'[{BLANKS}]*\{{[{BLANKS}]*"name"[{BLANKS}]*:[{BLANKS}]*"(?P<name>{NAME.pattern})"[{BLANKS}]*,'
    rf'[{BLANKS}]*"(?:arguments|parameters)"[{BLANKS}]*:[{BLANKS}]*(?=\{{)'
)
"""How models are told to begin a call; one that is begun otherwise is told when it is whole."""
MORE = re.compile(rf'[{BLANKS}]*,[{BLANKS}]*"')
"""Something else stands in the object of a call."""
BETWEEN = re.compile(rf"[;,{BLANKS}]*")


@dataclass(frozen=True, slots=True)
class Begun:
    """A call, of which nothing is known but its name."""

    call: Call


@dataclass(frozen=True, slots=True)
class Argued:
    """Further characters of the arguments of the call that began last."""

    text: str


@dataclass(frozen=True, slots=True)
class Ended:
    """The call that began last is over, well formed or not."""


Piece = str | Begun | Argued | Ended
"""What is certain of an answer; a `str` is content."""


class Brackets:
    """Follows JSON to the end of its first object, however its cuts fall; also what is not quite JSON."""

    def __init__(self, depth: int = 0):
        self.depth, self.quoted, self.escaped = depth, False, False

    def feed(self, text: str, tag: str) -> tuple[int, bool]:
        """How many characters are the object's, and whether it is over: it has closed, or `tag` follows.

        What may become the tag is not counted.
        """
        for at, sign in enumerate(text):
            if sign == "\n":  # no string of JSON goes over lines: where one does, a tag must still be found
                self.quoted = self.escaped = False
            elif self.escaped:
                self.escaped = False
            elif self.quoted:
                self.quoted, self.escaped = sign != '"', sign == "\\"
            elif sign == '"':
                self.quoted = True
            elif sign in "{[":
                self.depth += 1
            elif sign in "}]":
                self.depth -= 1
                if self.depth <= 0:
                    return at + 1, True
            elif sign == "<" and tag and tag.startswith(rest := text[at : at + len(tag)]):
                return at, rest == tag
        return len(text), False


class CallReader:
    """Reads one answer; `text` and `calls` are what came of it so far."""

    def __init__(self, toolbox: Toolbox):
        self.names, self.hermes = toolbox.names, toolbox.style == "hermes"
        self.tag = CLOSE if self.hermes else ""
        self.text = ""
        self.calls: list[Call] = []
        self.left, self.last = "", False
        self.found: list[Piece] = []
        self.held = ""
        """Stands before what may be a call, and is content if that is none."""
        self.brackets, self.seen = Brackets(), 0
        self.step: Callable[[], bool] = self.talk if self.hermes else self.head

    @property
    def cut(self) -> bool:
        """Whether the answer ended within a call."""
        return self.step == self.argue

    def feed(self, text: str) -> list[Piece]:
        """What the text, after all that came before, makes certain."""
        self.left += text
        return self.run()

    def close(self) -> list[Piece]:
        """The rest, when the answer is over."""
        self.last = True
        return self.run()

    def run(self) -> list[Piece]:
        while self.step():
            pass
        found, self.found = self.found, []
        return found

    def tell(self, *pieces: Piece) -> None:
        for piece in pieces:
            match piece:
                case str():
                    self.text += piece
                case Begun():
                    self.calls.append(piece.call)
                case Argued():
                    self.calls[-1] = replace(self.calls[-1], arguments=self.calls[-1].arguments + piece.text)
            if piece:
                self.found.append(piece)

    # ---- states: each reads from the front of `left`, and says whether another one may go on ----

    def talk(self) -> bool:
        """Content, until a call may begin."""
        if not self.hermes:
            self.tell(self.left)
            self.left = ""
            return False
        before, tag, rest = self.left.partition(OPEN)
        if not tag and self.last:
            self.tell("" if self.calls and before.isspace() else before)
            self.left = ""
            return False
        maybe = next((n for n in range(len(OPEN) - 1, 0, -1) if before.endswith(OPEN[:n])), 0) if not tag else 0
        # Blank space before a call belongs to its layout: it waits for what follows.
        said = before[: len(before) - maybe].rstrip()
        self.tell(said)
        if not tag:
            self.left = before[len(said) :]
            return False
        return self.expect(before[len(said) :] + OPEN, rest)

    def expect(self, held: str, rest: str) -> bool:
        self.held, self.left = held, rest
        self.brackets, self.seen, self.step = Brackets(), 0, self.head
        return True

    def head(self) -> bool:
        """What may be a call, until it is one or cannot be."""
        start = self.left.lstrip(BLANKS)
        if not start and not self.last:
            return False
        if not start.startswith("{"):
            return self.decline()
        if begun := HEAD.match(self.left):
            if begun["name"] not in self.names:
                return self.decline()
            self.tell(Begun(Call(begun["name"], "")))
            self.left, self.brackets, self.step = self.left[begun.end() :], Brackets(), self.argue
            return True
        count, over = self.brackets.feed(self.left[self.seen :], self.tag)
        self.seen += count
        if not over:
            return self.decline() if self.last else False
        call = self.call_in(self.left[: self.seen]) if self.brackets.depth <= 0 else None
        if call is None:
            return self.decline()
        self.tell(Begun(replace(call, arguments="")), Argued(call.arguments), Ended())
        self.left, self.step = self.left[self.seen :], self.between
        return True

    def decline(self) -> bool:
        self.tell(self.held)
        self.step = self.talk
        return True

    def argue(self) -> bool:
        """The arguments of a call."""
        count, over = self.brackets.feed(self.left, self.tag)
        count = len(self.left) if self.last and not over else count
        said, self.left = self.left[:count], self.left[count:]
        if said:
            self.tell(Argued(said))
        if over:
            self.tell(Ended())
            self.step = self.behind
        return over

    def behind(self) -> bool:
        """The rest of the object whose arguments are over."""
        rest = self.left.lstrip(BLANKS)
        if rest.startswith("}"):
            self.left, self.step = rest[1:], self.between
        elif MORE.match(self.left):
            self.brackets, self.step = Brackets(depth=1), self.skip
        elif not self.last and not rest.strip(BLANKS + ","):
            return False
        else:
            self.step = self.between
        return True

    def skip(self) -> bool:
        """What a call says beside its name and its arguments: nobody reads it."""
        count, over = self.brackets.feed(self.left, self.tag)
        self.left = self.left[count:]
        if over:
            self.step = self.between
        return over

    def between(self) -> bool:
        """After a call: another one, the end of its tag, or something else."""
        rest = BETWEEN.sub("", self.left, count=1)
        held = self.left[: len(self.left) - len(rest)]
        if self.hermes and rest.startswith(CLOSE):
            self.left, self.step = rest[len(CLOSE) :], self.talk
            return True
        if rest.startswith("{"):
            return self.expect(held, rest)
        if not self.last and (not rest or (self.hermes and CLOSE.startswith(rest))):
            return False
        if rest:
            self.step = self.talk
        return bool(rest)

    def call_in(self, text: str) -> Call | None:
        """The call that a JSON object is; None if it is none."""
        try:
            body = json.loads(text)
            arguments = body.get("arguments", body.get("parameters", {}))
            if body.get("name") not in self.names or not isinstance(arguments, dict):
                return None
            return Call(body["name"], json.dumps(arguments))  # ASCII: half of a surrogate pair stays an escape
        except (ValueError, AttributeError, RecursionError, TypeError):
            return None
