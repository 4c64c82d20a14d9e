"""Conversations to token ids by a checkpoint's own Jinja template, where neither it nor what people typed is trusted.

The template is rendered with a secret word in the place of each message, so that its own text and what was said are
told apart. Only its own text can hold control tokens: the tokenizer knows them under secret names alone, and what was
said goes to it as it is. An assistant's words are encoded apart from the prompt before them, as they are when a model
says them, so that training, evaluation and serving read the same ids.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import cached_property
from itertools import pairwise
from typing import Any

from tokenizers import AddedToken, models
from tokenizers import Tokenizer as Backend

from litchi.config import BadInput
from litchi.schema.sample import Role
from litchi.schema.templates import SOME_DAY, Sandbox, compiled

SPEAKERS = (Role.SYSTEM, Role.USER, Role.ASSISTANT, Role.TOOL)

PROBES = (
    (Role.USER, Role.ASSISTANT, Role.USER),
    (Role.SYSTEM, Role.USER),
    (Role.SYSTEM, Role.USER, Role.ASSISTANT, Role.USER),
    (Role.USER, Role.ASSISTANT, Role.TOOL),
)
"""Conversations that show how a template marks who speaks. It may refuse some."""

MAX_HEADERS, MAX_HEADER = 64, 128
"""How many role headers a template may have, and with how many characters: each text is searched for all of them."""


@dataclass(frozen=True, slots=True)
class Message:
    """What one speaker says. `weight` is the loss weight of an assistant's turn: 0 means read only."""

    role: Role
    text: str
    weight: float = 0.0
    pictures: tuple[int, ...] = ()
    """Where in the text the speaker shows a picture, in characters, in order."""

    def __post_init__(self) -> None:
        if self.role not in SPEAKERS:
            raise BadInput(f"a message is by {', '.join(SPEAKERS)} and not by {self.role.value!r}; name one of these")
        if self.weight < 0 or (self.weight and self.role is not Role.ASSISTANT):
            raise BadInput(f"a message by {self.role.value} has weight {self.weight}: only an assistant's may, above 0")

    @property
    def content(self) -> list[str | None]:
        """The text in pieces, None for each picture between them."""
        if not self.pictures:
            return [self.text]
        found: list[str | None] = []
        for start, stop in pairwise((0, *self.pictures, len(self.text))):
            found += [self.text[start:stop]] * (stop > start) + [None]
        return found[:-1]


def said(messages: Sequence[Message]) -> list[Message]:
    """All that is said, in order, each piece of text between pictures a message of its own."""
    return [Message(m.role, text, m.weight) for m in messages for text in m.content if text is not None]


def telling(messages: Sequence[Message], tools: Sequence[str]) -> list[Message]:
    """A conversation whose system turn tells the tools, and that calls are written as Hermes writes them."""
    text = TELLING.format(tools="\n".join(tools))
    if messages and messages[0].role is Role.SYSTEM:
        first = messages[0]
        return [replace(first, text=f"{first.text}\n\n{text}"), *messages[1:]]
    return [Message(Role.SYSTEM, text), *messages]


TELLING = """\
You may call functions to help with what is asked. These are the functions, one JSON object a line:
<tools>
{tools}
</tools>
To call one, answer with a JSON object of its name and arguments:
<tool_call>
{{"name": "...", "arguments": {{...}}}}
</tool_call>"""


@dataclass(frozen=True, slots=True)
class ChatTokens:
    """The ids of a conversation, and the loss weight with which each of them is predicted."""

    ids: list[int]
    weights: list[float]


@dataclass(frozen=True, slots=True)
class Stretch:
    """A stretch of a rendered conversation: what message `index` says, or without one the template's own text."""

    text: str
    index: int | None = None


@dataclass(frozen=True, slots=True)
class Turn:
    """Where in a script message `index` is said, and where the control token stops that ends it."""

    index: int
    start: int
    stop: int
    end: int


@dataclass(frozen=True, slots=True)
class Script:
    """A conversation as one text with control tokens under secret names; at `seams` an assistant begins to speak."""

    text: str
    controls: list[tuple[int, int]]
    turns: list[Turn]
    seams: set[int]


@dataclass(frozen=True, slots=True)
class Spelling:
    """The tokens of a script, and for each the characters (start, end) that it stands for."""

    ids: list[int]
    spans: list[tuple[int, int]]


# ---- conversations ------------------------------------------------------------------------------------------------


class ChatTemplate:
    """A template in Jinja and a tokenizer; `encode` is the one way from a conversation to ids.

    Control tokens are the special added tokens of `backend`; what it adds and calls not special is text to it and to
    us. Ids of harmless text are those of `apply_chat_template` in transformers, but for one thing that is meant: if a
    prompt ends in a space (SUS-Chat's "### Assistant: "), that space stays a token of its own before an answer that is
    known, as it must before one that is not. Raises BadInput for a template that does not compile, refuses a question
    and its answer or asks for more than a template needs. `backend` is left as it is.
    """

    def __init__(self, source: str, backend: Backend, *, bos: str = "", eos: str = "", today: date = SOME_DAY) -> None:
        self.code = compiled(source)
        self.names = {"bos_token": bos, "eos_token": eos}
        self.today = today
        self.speller = Speller(backend)
        for name in filter(None, (bos, eos)):
            if name not in self.speller.secret:
                raise BadInput(f"{name!r} is no control token of this tokenizer: {', '.join(self.speller.secret)} are")
        self.listed = False
        self.listed = self.wants_lists()
        self.lead = self.find_lead()
        probes = list(self.probes())
        self.headers = header_pattern(role_headers(probes))
        self.header_ids = self.find_header_ids(probes)

    def encode(self, messages: Sequence[Message], *, opened: bool, tools: Sequence[str] = ()) -> ChatTokens:
        """The ids of a conversation with their loss weights; with `opened` they end where an assistant begins to speak.

        Weight falls on what an assistant says and on the control token that ends it. `tools` are JSON objects that the
        template lays out, or that the system turn tells where it shows none. Raises BadInput if the template refuses
        the conversation, shows neither, or does more to a text than trim or quote it, and if a text holds a role header
        that the tokenizer can spell in one way only.
        """
        given = self.checked(tools)
        if given and not self.shows_tools:
            messages, given = telling(messages, tools), []
        told = said(messages)
        script = self.script(self.stretches(messages, opened, given), told)
        spelling = self.spelled(script)
        weight_at = [0.0] * (len(script.text) + 1)
        for turn in script.turns:
            weight_at[turn.start : turn.end] = [told[turn.index].weight] * (turn.end - turn.start)
        weights = []
        for index, (start, end) in zip(spelling.ids, spelling.spans, strict=True):
            # Some control tokens swallow the spaces beside them; where one begins says whose it is.
            length = 1 if index in self.speller.controls else max(end - start, 1)
            weights.append(max(weight_at[start : start + length]))
        return ChatTokens(spelling.ids, weights)

    def checked(self, tools: Sequence[str]) -> list[Any]:
        """Tools as the template is given them: a part of its own text, where nobody may write control tokens."""
        if tools and not (self.shows_tools or self.shows_system):
            raise BadInput("this model's chat template shows no tools, and no system turn to tell them: leave them out")
        for tool in tools:
            plain = json.dumps(json.loads(tool), ensure_ascii=False)
            for text in (plain, *texts_in(json.loads(tool))):
                if found := self.speller.pattern.search(text) or self.headers.search(text):
                    raise BadInput(
                        f"a tool holds {found[1]!r}, by which this chat template speaks; write it differently"
                    )
        return [json.loads(tool) for tool in tools]

    @cached_property
    def shows_tools(self) -> bool:
        word = secret_word()
        tool = {"type": "function", "function": {"name": word, "description": "", "parameters": {"type": "object"}}}
        try:
            return word in self.render([Message(Role.USER, "q")], ["q"], opened=True, tools=[tool])
        except BadInput:
            return False

    @cached_property
    def shows_system(self) -> bool:
        word = secret_word()
        try:
            return word in self.render([Message(Role.SYSTEM, word), Message(Role.USER, "q")], [word, "q"], opened=True)
        except BadInput:
            return False

    def stretches(self, messages: Sequence[Message], opened: bool, tools: Sequence[Any] = ()) -> list[Stretch]:
        """The conversation as the template lays it out, what is said told apart from its own text."""
        if not messages:
            raise BadInput("a conversation has one message at least")
        told = said(messages)
        marks = [secret_word() for _ in told]
        pieces = re.split(f"({'|'.join(marks) or '(?!)'})", self.render(messages, marks, opened, tools))
        own, order = pieces[::2], [marks.index(mark) for mark in pieces[1::2]]
        for index, message in enumerate(told):
            if (times := order.count(index)) != 1:
                raise BadInput(
                    f"the chat template shows message {index}, by {message.role.value}, {times} times and not once;"
                    " leave the message out or mend the template"
                )
        real = self.render(messages, [message.text for message in told], opened, tools)
        stretches, at = [Stretch(own[0])], len(own[0])
        for index, following in zip(order, own[1:], strict=True):
            shown = next((s for s in shapes(told[index].text) if real.startswith(s + following, at)), None)
            if shown is None:
                raise BadInput(
                    f"the chat template makes something else of message {index}, or of one beside it, than of plain"
                    " words; leave out of the text what may be a tag to it"
                )
            stretches += [Stretch(shown, index), Stretch(following)]
            at += len(shown) + len(following)
        if "".join(stretch.text for stretch in stretches) != real:
            raise BadInput("the chat template changes with what is said in it; mend the template")
        return stretches

    def render(self, messages: Sequence[Message], texts: Sequence[str], opened: bool, tools: Sequence[Any] = ()) -> str:
        """What the template prints, with `texts` in place of all that is said. A picture is one of its own tokens."""
        left, turns = iter(texts), []
        for message in messages:
            pieces = [None if piece is None else next(left) for piece in message.content]
            turns.append({"role": message.role.value, "content": self.laid_out(pieces)})
        given = {"tools": list(tools)} if tools else {}
        characters = sum(map(len, texts)) + 4 * len(json.dumps(given))
        sandbox = Sandbox(self.today, characters=characters, turns=max(len(texts), len(messages)) + len(tools))
        return sandbox.run(self.code, {"messages": turns, "add_generation_prompt": opened, **self.names, **given})

    def laid_out(self, pieces: Sequence[str | None]) -> Any:
        """What a message says as templates are given it: one text, or a list where pictures stand between texts."""
        if pieces and None not in pieces and not self.listed:
            return "".join(piece for piece in pieces if piece is not None)
        return [{"type": "image"} if piece is None else {"type": "text", "text": piece} for piece in pieces]

    def wants_lists(self) -> bool:
        """Whether the template shows no plain text, only lists of texts and pictures (LLaVA's)."""
        word = secret_word()
        if word in self.render([Message(Role.USER, word)], [word], opened=True):
            return False
        self.listed = True  # tried, and kept if the text comes out of the list and not the list itself
        shown = self.render([Message(Role.USER, word)], [word], opened=True)
        return word in shown and "'type'" not in shown

    def script(self, stretches: Sequence[Stretch], messages: Sequence[Message]) -> Script:
        """The stretches as one text for the speller."""
        text, controls, turns, seams = "", [], [], set()

        def write(own: str) -> None:
            nonlocal text
            for piece in self.speller.split(own):
                name = self.speller.secret.get(piece, piece)
                if name != piece:
                    controls.append((len(text), len(text) + len(name)))
                text += name

        for stretch, following in pairwise([*stretches, Stretch("")]):
            if stretch.index is not None:
                stop = len(text) + len(stretch.text)
                end = stop + self.speller.reach(following.text)
                turns.append(Turn(stretch.index, len(text), stop, end))
                text += stretch.text
            elif following.index is not None and messages[following.index].role is Role.ASSISTANT:
                prompt = stretch.text.removesuffix(self.lead)
                write(prompt)
                seams.add(len(text))
                write(stretch.text[len(prompt) :])
            else:
                write(stretch.text)
        return Script(text, controls, turns, seams)

    # ---- role headers ----------------------------------------------------------------------------------------------

    def find_lead(self) -> str:
        """What the template puts between a prompt and the assistant's words: a space in Llama 2, mostly nothing."""
        question, answer = Message(Role.USER, "q"), Message(Role.ASSISTANT, "a")
        prompt = self.stretches([question], opened=True)[-1].text
        told = self.stretches([question, answer], opened=False)[2].text
        return told.removeprefix(prompt) if told.startswith(prompt) else ""

    def probes(self) -> Iterator[Script]:
        for roles in PROBES:
            messages = [Message(role, "x") for role in roles]
            try:
                yield self.script(self.stretches(messages, opened=True), messages)
            except BadInput:
                continue

    def find_header_ids(self, probes: Iterable[Script]) -> dict[int, set[tuple[int, ...]]]:
        """The ids with which the template itself writes its headers, by the first of them."""
        found: dict[int, set[tuple[int, ...]]] = {}
        for script in probes:
            spelling = self.speller.spell(script, script.seams)
            starts, ends = [start for start, _ in spelling.spans], [end for _, end in spelling.spans]
            for match in self.headers.finditer(script.text):
                first, last = bisect_right(ends, match.start(1)), bisect_left(starts, match.end(1))
                if ids := tuple(spelling.ids[first:last]):  # a tokenizer may drop what it does not know
                    found.setdefault(ids[0], set()).add(ids)
        return found

    def spelled(self, script: Script) -> Spelling:
        """The tokens of a script. A role header that a person typed is spelled in single characters, or in bytes."""
        cuts = set(script.seams)
        for turn in script.turns:
            for match in self.headers.finditer(script.text[turn.start : turn.stop]):
                cuts.update(range(turn.start + match.start(1), turn.start + match.end(1) + 1))
        spelling = self.speller.spell(script, cuts)
        if hits := self.typed_headers(script, spelling):
            for hit in hits:
                cuts.update(range(spelling.spans[hit[0]][0], spelling.spans[hit[-1]][1] + 1))
            spelling = self.speller.spell(script, cuts)
        if hits := self.typed_headers(script, spelling):
            spelling = self.speller.in_bytes(script, spelling, {hit[0] for hit in hits})
        if hits := self.typed_headers(script, spelling):
            header = script.text[spelling.spans[hits[0][0]][0] : spelling.spans[hits[0][-1]][1]]
            raise BadInput(f"{header!r} in a message is how this chat template marks who speaks; write it differently")
        return spelling

    def typed_headers(self, script: Script, spelling: Spelling) -> list[range]:
        """The tokens of each role header that lies within what somebody says."""
        starts, hits = [turn.start for turn in script.turns], []
        for first, index in enumerate(spelling.ids):
            for ids in self.header_ids.get(index, ()):
                tokens = range(first, first + len(ids))
                if tuple(spelling.ids[first : tokens.stop]) == ids:
                    turn = script.turns[max(bisect_right(starts, spelling.spans[first][0]) - 1, 0)]
                    if turn.start <= spelling.spans[first][0] and spelling.spans[tokens[-1]][1] <= turn.stop:
                        hits.append(tokens)
        return hits


def texts_in(value: Any) -> Iterator[str]:
    """Every text within a value of JSON, names too."""
    match value:
        case str():
            yield value
        case list():
            for each in value:
                yield from texts_in(each)
        case dict():
            yield from value
            for each in value.values():
                yield from texts_in(each)


def shapes(text: str) -> list[str]:
    """A text as templates show it: as it is, trimmed, or inside a string of JSON; the longest first."""
    trimmed = {cut(text) for cut in (str, str.strip, str.lstrip, str.rstrip)}
    trimmed |= {text.strip("\n"), text.lstrip("\n"), text.rstrip("\n")}
    return [*sorted(trimmed, key=len, reverse=True), json.dumps(text, ensure_ascii=False)[1:-1]]


def role_headers(probes: Iterable[Script]) -> set[str]:
    """Plain text by which a template marks who speaks: its own lines beside messages and control tokens.

    A bare word behind a control token, as in "<|im_start|>user", is none, for there the control token is the mark.
    """
    lines: set[str] = set()
    for script in probes:
        borders = sorted([*script.controls, *((turn.start, turn.stop) for turn in script.turns)])
        edges = [0, *(edge for border in borders for edge in border), len(script.text)]
        marked = {stop for _, stop in script.controls}
        for start, stop in zip(edges[::2], edges[1::2], strict=True):
            own = script.text[start:stop].strip().splitlines() or [""]
            lines |= {line.strip() for line in (own[0], own[-1]) if start not in marked or not is_word(line)}
    headers: set[str] = set()
    for line in sorted(lines, key=len):  # "[INST] <<SYS>>" beside "[INST]" shows that "<<SYS>>" is one too
        parts = re.split("|".join(map(re.escape, headers)) or "(?!)", line)
        parts = {part.strip() for part in parts if any(map(str.isalnum, part))}
        headers |= {line} if any(map(is_word, parts)) else parts
    headers = {header for header in headers if len(header) <= MAX_HEADER}
    if len(headers) > MAX_HEADERS:
        raise BadInput(f"the chat template marks who speaks in {len(headers)} ways; at most {MAX_HEADERS} are known")
    return headers


def header_pattern(headers: Iterable[str]) -> re.Pattern[str]:
    """Matches, overlaps too, where group 1 is a header that stands by itself: "A:" not in "USA:"."""

    def alone(header: str) -> str:
        edges = (r"(?<!\w)" if header[0].isalnum() else "", r"(?!\w)" if header[-1].isalnum() else "")
        return re.escape(header).join(edges)

    longest_first = sorted(headers, key=len, reverse=True)
    return re.compile(f"(?=({'|'.join(map(alone, longest_first)) or '(?!)'}))")


def secret_word() -> str:
    """Letters alone, so that a template that trims or tests what is said finds plain words."""
    return "".join(secrets.choice(string.ascii_letters) for _ in range(24))


# ---- control tokens -----------------------------------------------------------------------------------------------


class Speller:
    """A tokenizer that knows its control tokens by secret names alone, so that nobody can type one.

    What it does with all other text, and with the spaces beside a control token, is what `backend` does.
    """

    def __init__(self, backend: Backend) -> None:
        state = json.loads(backend.to_str())
        names: list[str] = [token["content"] for token in state["added_tokens"] if token["special"]]
        self.secret = {name: secret_word() for name in names}
        self.controls = {backend.token_to_id(name) for name in names}
        either = "|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)"
        self.pattern = re.compile(f"({either})")
        self.ending = re.compile(rf"(\s*)({either})")
        renamed = rename(state, self.secret)
        self.outer = built(renamed)
        bare = renamed | {key: unprefixed(renamed[key]) for key in ("normalizer", "pre_tokenizer")}
        self.inner = self.outer if bare == renamed else built(bare)
        fallback = [backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        self.bytes = fallback if state["model"].get("byte_fallback") and None not in fallback else None
        for name, word in self.secret.items():
            if self.outer.encode(word, add_special_tokens=False).ids != [backend.token_to_id(name)]:
                raise BadInput(f"the tokenizer cuts through its control token {name!r}; mend its added tokens")

    def split(self, text: str) -> list[str]:
        """The text of a template in pieces, the control tokens at odd places."""
        return self.pattern.split(text)

    def reach(self, text: str) -> int:
        """How far its end reaches into the text after a turn: over spaces to the end of a control token, or nowhere."""
        match = self.ending.match(text)
        return len(match[1]) + len(self.secret[match[2]]) if match else 0

    def spell(self, script: Script, cuts: set[int]) -> Spelling:
        """Tokens, none of which reaches over a cut.

        After a cut a text goes on: a tokenizer that puts a space before each text that it is given puts none there.
        """
        starts = [start for start, _ in script.controls]
        chunks = {0: self.outer}
        for cut in cuts.difference(starts, (end for _, end in script.controls), (0, len(script.text))):
            chunks[cut] = self.inner
            if self.inner is not self.outer and (following := bisect_left(starts, cut)) < len(starts):
                chunks[starts[following]] = self.outer
        ids, spans = [], []
        for start, end in pairwise([*sorted(chunks), len(script.text)]):
            encoding = chunks[start].encode(script.text[start:end], add_special_tokens=False)
            ids += encoding.ids
            spans += [(start + a, start + b) for a, b in encoding.offsets]
        return Spelling(ids, spans)

    def in_bytes(self, script: Script, spelling: Spelling, at: set[int]) -> Spelling:
        """The same text with the tokens `at` in bytes, if the tokenizer has tokens for bytes beside those for text."""
        ids, spans = [], []
        for place, (index, span) in enumerate(zip(spelling.ids, spelling.spans, strict=True)):
            known = script.text[slice(*span)].encode() if self.bytes and place in at else b""
            spelled = [self.bytes[byte] for byte in known] if self.bytes and known else [index]
            ids += spelled
            spans += [span] * len(spelled)
        return Spelling(ids, spans)


def is_word(text: str) -> bool:
    return all(c.isalnum() or c.isspace() or c in "_-" for c in text)


def rename(state: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A tokenizer, as JSON, that calls its tokens by other names."""
    added = [
        token | {"content": names[token["content"]], "normalized": False} if token["content"] in names else token
        for token in state["added_tokens"]
    ]
    model = dict(state["model"])
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(piece, piece): index for piece, index in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        pairs = model["merges"]
        model["merges"] = [(a, b) for a, b in pairs if a not in names and b not in names and a + b not in names]
    return {**state, "added_tokens": added, "model": model} | dict.fromkeys(("truncation", "padding", "post_processor"))


def built(state: Mapping[str, Any]) -> Backend:
    """The tokenizer that is such JSON. BPE is handed over as it is: to write and read it takes three times as long.

    oracle: Backend.from_str
    """
    model = state["model"]
    if model["type"] != "BPE":
        return Backend.from_str(json.dumps(state))
    empty = state | {"model": model | {"vocab": {}, "merges": [], "unk_token": None}, "added_tokens": []}
    backend = Backend.from_str(json.dumps(empty))
    options = {key: value for key, value in model.items() if key != "type" and value is not None}
    backend.model = models.BPE(**options | {"merges": list(map(tuple, model["merges"]))})
    for token in sorted(state["added_tokens"], key=lambda token: token["id"]):
        flags = {key: token[key] for key in ("single_word", "lstrip", "rstrip", "normalized", "special")}
        added = AddedToken(token["content"], **flags)
        backend.add_special_tokens([added]) if token["special"] else backend.add_tokens([added])
    return backend


def unprefixed(step: dict[str, Any] | None) -> dict[str, Any] | None:
    """A normaliser or pre-tokeniser, as JSON, without what puts a space before a text."""
    match step:
        case {"type": "Prepend"}:
            return None
        case {"type": "Metaspace"}:
            return step | {"prepend_scheme": "never"}
        case {"type": "ByteLevel", "add_prefix_space": _}:
            return step | {"add_prefix_space": False}
        case {"type": "Sequence"}:
            key = "normalizers" if "normalizers" in step else "pretokenizers"
            return step | {key: [kept for kept in map(unprefixed, step[key]) if kept]}
        case _:
            return step
