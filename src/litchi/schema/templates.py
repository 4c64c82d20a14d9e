"""Chat templates in Jinja: those of six families in our own words, and the sandbox in which anybody's is run.

A template is given `messages` with `role` and `content`, `add_generation_prompt`, `bos_token` and `eos_token`. What is
said of a family below was read in its publisher's pages or tests unless it says "from memory".
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import date
from functools import wraps
from types import CodeType
from typing import Any, NoReturn

from jinja2 import Template, Undefined, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import FILTERS
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.tests import TESTS
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from litchi.config import BadInput

# ---- families -----------------------------------------------------------------------------------------------------

CHATML = r"""
{%- for message in messages -%}
    {{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<|im_start|>assistant\n' }}
{%- endif -%}
"""
"""OpenAI's ChatML: every role by its name. Yi-34B-Chat's template (from memory) prints the same."""

QWEN = r"""
{%- if messages and messages[0].role != 'system' -%}
    {{ '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n' }}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role != 'tool' -%}
        {{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- else -%}
        {%- if not loop.previtem or loop.previtem.role != 'tool' -%}
            {{ '<|im_start|>user' }}
        {%- endif -%}
        {{ '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
        {%- if not loop.nextitem or loop.nextitem.role != 'tool' -%}
            {{ '<|im_end|>\n' }}
        {%- endif -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<|im_start|>assistant\n' }}
{%- endif -%}
"""
"""Qwen2.5: ChatML with a system prompt that stands in for a missing one. Results of tools, which a user's turn carries,
are from memory."""

LLAMA2 = r"""
{%- set system = messages[0].content if messages and messages[0].role == 'system' else none -%}
{%- for message in (messages if system is none else messages[1:]) -%}
    {%- if message.role != ['user', 'assistant'][loop.index0 % 2] -%}
        {{ raise_exception('user and assistant must take turns, after one system message at most') }}
    {%- endif -%}
    {%- if message.role == 'assistant' -%}
        {{ ' ' + message.content.strip() + ' ' + eos_token }}
    {%- elif loop.first and system is not none -%}
        {{ bos_token + '[INST] <<SYS>>\n' + system + '\n<</SYS>>\n\n' + message.content.rstrip() + ' [/INST]' }}
    {%- else -%}
        {{ bos_token + '[INST] ' + message.content.strip() + ' [/INST]' }}
    {%- endif -%}
{%- endfor -%}
"""
"""Llama 2, as Meta's `llama/generation.py` writes it (from memory): a question begins a document, its marks are plain
text, and the system prompt is a part of the first question."""

LLAMA3 = r"""
{{- bos_token -}}
{%- for message in messages -%}
    {%- set role = 'ipython' if message.role == 'tool' else message.role -%}
    {{ '<|start_header_id|>' + role + '<|end_header_id|>\n\n' + message.content.strip() + '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif -%}
"""
"""Llama 3, without the dates that 3.1 adds; `ipython`, a tool, is 3.1's."""

MISTRAL = r"""
{{- bos_token -}}
{%- set spoken = messages | rejectattr('role', 'equalto', 'system') | list -%}
{%- set system = messages | selectattr('role', 'equalto', 'system') | list -%}
{%- if system | length > 1 or (system and messages[0].role != 'system') -%}
    {{ raise_exception('there may be one system message, the first') }}
{%- endif -%}
{%- set questions = spoken | selectattr('role', 'equalto', 'user') | list -%}
{%- for message in spoken -%}
    {%- if message.role != ['user', 'assistant'][loop.index0 % 2] -%}
        {{ raise_exception('user and assistant must take turns') }}
    {%- endif -%}
    {%- if message.role == 'assistant' -%}
        {{ ' ' + message.content.strip() + eos_token }}
    {%- elif system and loop.index0 == 2 * (questions | length) - 2 -%}
        {{ '[INST] ' + system[0].content + '\n\n' + message.content + '[/INST]' }}
    {%- else -%}
        {{ '[INST] ' + message.content + '[/INST]' }}
    {%- endif -%}
{%- endfor -%}
"""
"""Mistral v3, as the tests of mistral-common have it: control tokens [INST] and [/INST], one space behind each and none
before, the system prompt before the last question. Trimming an answer is from memory."""

SUS = r"""
{%- for message in messages -%}
    {%- if message.role == 'assistant' -%}
        {{ message.content + eos_token }}
    {%- elif message.role == 'tool' -%}
        {{ raise_exception('there is no tool in SUS-Chat') }}
    {%- else -%}
        {{ '### Human: ' + message.content + '\n\n### Assistant: ' }}
    {%- endif -%}
{%- endfor -%}
"""
"""SUS-Chat-34B, as the README of SUSTech-IDEA/SUS-Chat prints it, with the <|endoftext|> that its history keeps.

A system message is treated as a user's, says issue 3 of that repository, so it too opens an answer."""

TEMPLATES = {
    "chatml": CHATML,
    "llama2": LLAMA2,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "qwen": QWEN,
    "yi": CHATML,
    "sus": SUS,
}

# ---- sandbox ------------------------------------------------------------------------------------------------------

SOME_DAY = date(2024, 7, 26)
"""The day that a template is told unless another is given: always the same, so that the ids are."""

MAX_SOURCE, MAX_RANGE, MAX_BITS, MAX_SOUGHT, MAX_NAME = 64 * 1024, 10_000, 1024, 1024, 64
"""Characters of a template, numbers in a range, bits of a number, characters that a method of a text looks for, and
characters of what a filter is told, which may be a path. No published template that we know comes near.
"""

STATEMENTS = (
    nodes.Output, nodes.For, nodes.If, nodes.Macro, nodes.CallBlock, nodes.FilterBlock, nodes.With, nodes.Scope,
    nodes.Assign, nodes.AssignBlock, nodes.Break, nodes.Continue,
)  # fmt: skip
QUICK_FILTERS = "count d default first last length".split()
SLOW_FILTERS = (
    "abs capitalize dictsort float int items list lower map max min reject rejectattr reverse select selectattr sort"
    " string title unique upper"
).split()
"""Jinja's own that a template may use; the quick ones do not look at every item."""

TEXT_METHODS = frozenset(
    "capitalize count endswith find index isalnum isalpha isdigit islower isspace isupper join lower lstrip partition"
    " removeprefix removesuffix replace rstrip split splitlines startswith strip title upper".split()
)
DICT_METHODS = frozenset(("get", "items", "keys", "values"))


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja for one run of a stranger's template: no files, no Python, a bounded number of steps and bounded values.

    Whatever repeats, makes a value or looks through one spends steps: one for each item that it touches and one more
    for each 64 characters. No value may be larger than `room`. So a run ends soon, in any thread and without a clock.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, today: date = SOME_DAY, *, characters: int = 0, turns: int = 0) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[Generation, loopcontrols])
        self.today = today
        self.room = 2**18 + 8 * characters + 128 * turns
        self.steps = 2**16 + 2**12 * turns + characters
        self.finalize = self.weighed
        self.filters = {name: self.bounded(FILTERS[name], self.touch) for name in SLOW_FILTERS}
        self.filters |= {name: self.bounded(FILTERS[name], self.pass_by) for name in QUICK_FILTERS}
        self.filters |= {"each": self.each, "weighed": self.weighed, "safe": self.weighed}
        self.filters |= {"join": self.joined, "replace": self.replaced, "trim": self.trimmed, "tojson": self.json}
        self.tests = {name: self.bounded(test, self.size) for name, test in TESTS.items()}
        known: dict[str, Any] = {"range": self.numbers, "dict": dict, "namespace": Notes}
        self.globals = known | {"raise_exception": self.refuse, "strftime_now": self.today_as}
        self.known = tuple(self.globals.values())

    def run(self, code: CodeType, variables: Mapping[str, Any]) -> str:
        """What the template prints. Raises BadInput for whatever goes wrong in it."""
        try:
            return self.joined(Template.from_code(self, code, self.globals).generate(variables))
        except Exception as error:  # a template can raise any
            raise BadInput(f"the chat template fails: {first_line(error)}") from error

    # ---- the meter -------------------------------------------------------------------------------------------------

    def spend(self, steps: int) -> None:
        self.steps -= steps
        if self.steps < 0:
            raise SecurityError("it takes more steps than a conversation needs")

    def fit(self, size: int) -> None:
        if size > self.room:
            raise SecurityError("it makes more text than a conversation needs")

    def weighed(self, value: Any) -> Any:
        """The value, if it is not too large; what would be made item by item is made here."""
        if not isinstance(value, Iterator):
            self.size(value)
            return value
        made, size = [], 0
        for item in value:
            made.append(item)
            size += self.size(item)
            self.fit(size)
        return made

    def size(self, value: Any) -> int:
        """Characters and items of a value and of all that it holds, which may hold one thing many times."""
        size, rest = 0, [value]
        while rest:
            item = rest.pop()
            size += 1
            self.touch(item)
            match item:
                case str():
                    size += len(item)
                case int() if item.bit_length() > MAX_BITS:
                    size += self.room
                case dict():
                    rest += [*item.keys(), *item.values()]
                case list() | tuple():
                    rest += item
            self.fit(size + len(rest))
        return size

    def touch(self, value: Any) -> None:
        """Pay for a look at each item of a value, or each character."""
        self.spend(1 + (len(value) if isinstance(value, list | tuple | dict | range) else 0))
        self.spend(len(value) // 64 if isinstance(value, str) else 0)

    def pass_by(self, _: Any) -> None:
        """Pay for no look."""

    def each(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self.spend(1)
            yield item

    def bounded(self, function: Any, pay: Callable[[Any], Any]) -> Any:
        """A filter or test that pays for what it is given before and for its result after."""
        told = 2 if hasattr(function, "jinja_pass_arg") else 1  # Jinja puts its context before the value

        @wraps(function)  # which keeps that mark
        def result(*args: Any, **options: Any) -> Any:
            for value in args:
                pay(value)
            if pay == self.touch and any(
                isinstance(value, str) and len(value) > MAX_NAME for value in (*args[told:], *options.values())
            ):
                raise SecurityError(f"it tells a filter more than {MAX_NAME} characters")
            return self.weighed(function(*args, **options))

        return result

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        match operator, left, right:
            case "%", str(), _:
                raise SecurityError("it formats text with %, which no template needs; join the text with +")
            case "*", str(items) | list(items) | tuple(items), int(times):
                self.fit(len(items) * times)
            case "*", int(times), str(items) | list(items) | tuple(items):
                self.fit(len(items) * times)
            case "**", int(), int():
                self.fit(0 if left.bit_length() * right <= MAX_BITS else self.room + 1)
        return self.weighed(super().call_binop(context, operator, left, right))

    def call(self, context: Context, function: Any, /, *args: Any, **options: Any) -> Any:
        """Calls what a template may: macros, our helpers, and those methods of texts that only read them."""
        owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
        if isinstance(owner, str) and name in TEXT_METHODS:
            if name == "join":
                return self.joined(*args, d=owner)
            if name == "replace":
                return self.replaced(owner, *args)
            self.size([owner, *args])
            if any(isinstance(value, str) and len(value) > MAX_SOUGHT for value in args):
                raise SecurityError(f"it looks for more than {MAX_SOUGHT} characters by {name!r}")
        elif isinstance(owner, dict) and name in DICT_METHODS:
            found = super().call(context, function, *self.weighed(args), **options)
            return self.weighed(found if name == "get" else iter(found))
        elif isinstance(owner, LoopContext):
            self.size(args)
        elif not isinstance(function, Macro | Undefined) and all(function is not known for known in self.known):
            raise SecurityError(f"it calls {name or type(function).__name__!r}, which no template needs")
        return self.weighed(super().call(context, function, *args, **options))

    # ---- helpers ---------------------------------------------------------------------------------------------------

    def joined(self, items: Iterable[Any], d: str = "") -> str:
        pieces, size = [], 0
        for item in items:
            pieces.append(str(item))
            size += len(pieces[-1]) + len(d)
            self.fit(size)
        return self.weighed(d.join(pieces))

    concat = joined  # pyrefly: ignore[bad-override]  # how Jinja puts together what a macro or a block prints

    def replaced(self, text: Any, old: Any, new: Any, count: int = -1) -> str:
        text, old, new = map(str, self.weighed((text, old, new)))
        self.fit(len(text) + text.count(old) * len(new))
        return self.weighed(text.replace(old, new, count))

    def trimmed(self, text: Any, chars: str | None = None) -> str:
        self.fit(0 if len(chars or "") <= MAX_SOUGHT else self.room + 1)
        return self.weighed(str(text).strip(chars))

    def json(
        self, value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None,
        sort_keys: bool = False,
    ) -> str:  # fmt: skip
        """JSON as transformers writes it: without the escapes for HTML that Jinja's own filter adds."""
        self.fit(self.size(value) * len("".join(separators or "")))
        self.fit(0 if indent is None or 0 <= int(indent) <= 8 else self.room + 1)
        encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        return self.joined(encoder.iterencode(value))

    def numbers(self, *bounds: int) -> range:
        if len(numbers := range(*bounds)) > MAX_RANGE:
            raise SecurityError(f"it counts to {len(numbers)}, more than a conversation needs")
        return numbers

    def refuse(self, message: str) -> NoReturn:
        raise SecurityError(f"it refuses the conversation: {message}")

    def today_as(self, layout: str) -> str:
        self.fit(0 if len(layout) <= 64 else self.room + 1)
        return self.today.strftime(layout)


class Notes(Namespace):
    """What a template writes down as it goes, which it may not print: it can hold itself."""

    def __repr__(self) -> str:
        return "namespace"


class Generation(Extension):
    """`{% generation %}`, with which some templates mark what an assistant says, changes nothing that is printed."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class Metered(NodeTransformer):
    """Puts the meter where Jinja repeats, makes or compares values without asking its environment."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = filtered(node.iter, "each")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        return filtered(nodes.List(node.nodes, lineno=node.lineno), "join")

    def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:
        self.generic_visit(node)
        for side in (node, *node.ops):
            side.expr = filtered(side.expr, "weighed")
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Getitem:
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            node.arg = filtered(node.arg, "weighed")
        return node

    def visit_List(self, node: nodes.List) -> nodes.Filter:
        return filtered(self.generic_visit(node), "weighed")

    def visit_Dict(self, node: nodes.Dict) -> nodes.Filter:
        return filtered(self.generic_visit(node), "weighed")

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return filtered(node, "weighed") if node.ctx == "load" else node


def filtered(node: nodes.Node, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def compiled(source: str) -> CodeType:
    """The template as code for a `Sandbox` alone. Raises BadInput if it cannot be, or reads files."""
    if len(source) > MAX_SOURCE:
        raise BadInput(f"the chat template has {len(source)} characters; at most {MAX_SOURCE} are read")
    sandbox = Sandbox()
    try:
        tree = sandbox.parse(source)
        for node in tree.find_all(nodes.Stmt):
            if not isinstance(node, STATEMENTS) or (isinstance(node, nodes.For) and node.recursive):
                raise SecurityError(f"no template needs its {type(node).__name__} in line {node.lineno}")
        tree = Metered().visit(tree)
        tree.set_environment(sandbox)
        return sandbox.compile(tree)
    except Exception as error:  # beside its own, Jinja lets through what Python says of deep nesting
        raise BadInput(f"the chat template cannot be read: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    return next(iter(str(error)[:200].splitlines()), "") or type(error).__name__
