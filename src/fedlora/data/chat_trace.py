"""Tells whose text is whose in a rendered conversation.

A chat template is a loop over messages. It is compiled once more with a mark where an iteration
begins and ends, so that one rendering of the whole conversation says which characters were written
for which message: also where a template renders a turn otherwise when it is the last, leaves turns
out, or writes what a tool answered inside the assistant's turn.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from typing import Any

from jinja2 import Template, nodes

from fedlora.data.spans import Span, joined

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Traced:
    """A rendered conversation.

    Args:
        text: as `apply_chat_template` gives it.
        parts: of every message, the spans of the text that were written for it.
        rest: where the text begins that follows the last message's.
    """

    text: str
    parts: list[list[Span]]
    rest: int

    def of(self, message: int) -> str:
        """The text that was written for a message."""
        return "".join(self.text[lo:hi] for lo, hi in self.parts[message])


def plain_rendering(
    tokenizer: Any, messages: Messages, extra: Mapping[str, Any], generation: bool = False
) -> str:
    """The conversation as `apply_chat_template` renders it."""
    return str(
        tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=generation, **extra
        )
    )


def traced(
    tokenizer: Any, messages: Messages, extra: Mapping[str, Any], generation: bool = False
) -> Traced | None:
    """A rendered conversation of which it is known for which message every character was written.

    Args:
        tokenizer: of transformers.
        messages: as it takes them.
        extra: `tools` and whatever else the template is given.
        generation: with the prompt for the next assistant turn.

    Returns:
        None where the template does not go through the messages one by one, so that nothing can be
        said.

    Raises:
        Exception: whatever the template raises.
    """
    text = plain_rendering(tokenizer, messages, extra, generation)
    given = {key: value for key, value in extra.items() if key not in ("tools", "chat_template")}
    tools = extra.get("tools")
    template = _marking(tokenizer.get_chat_template(extra.get("chat_template"), tools))
    shown = _as_templates_see(messages)
    marks = _Marks(shown)
    marked = template.render(
        messages=shown,
        **{"tools": tools, "documents": None, **tokenizer.special_tokens_map, **given},
        add_generation_prompt=generation,
        fedlora_begin=marks.begin,
        fedlora_named=marks.named,
        fedlora_end=marks.end,
    )
    trace = _read(marked, len(messages))
    return trace if trace.text == text else None


def _as_templates_see(messages: Messages) -> list[dict[str, Any]]:
    """Copies as transformers makes them for a template: plain values, thoughts under all names."""
    from transformers.utils import chat_template_utils as utils

    plain: Callable[[Any], Any] = getattr(utils, "_plain_template_data", lambda value: value)
    alias: Callable[[Any], Any] = getattr(utils, "_alias_reasoning_fields", list)
    shown = [{k: plain(v) for k, v in message.items() if v is not None} for message in messages]
    return list(alias(shown))


# --- a template with marks ---

_MARK = re.compile("\ue000\uf8ff(?:(\\d+)|e)\ue001")


class _Marks:
    """What the marking template calls: which message a loop is at.

    Args:
        messages: the objects that the template is given.
    """

    def __init__(self, messages: Sequence[dict[str, Any]]) -> None:
        self._number = {id(message): i for i, message in enumerate(messages)}
        self._open: set[int] = set()  # loops within a message's iteration

    def begin(self, loop: int, *values: Any) -> str:
        """An iteration begins; the loop's variables have these values."""
        ended = self.end(loop)  # left by `continue`
        return ended + self.named(loop, *values)

    def named(self, loop: int, *values: Any) -> str:
        """A variable got a value in an iteration that is no message's yet."""
        if loop in self._open:
            return ""
        for value in values:
            if (number := self._number.get(id(value))) is not None:
                self._open.add(loop)
                return f"\ue000\uf8ff{number}\ue001"
        return ""

    def end(self, loop: int) -> str:
        """An iteration ends, or the loop."""
        if loop not in self._open:
            return ""
        self._open.remove(loop)
        return "\ue000\uf8ffe\ue001"


@lru_cache(maxsize=8)
def _marking(template: str) -> Template:
    """A chat template compiled with calls that mark where a loop's iterations begin and end."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    environment = _compile_jinja_template(template).environment
    tree = environment.parse(template)
    _mark(tree, None, count())
    tree.set_environment(environment)
    made: Template = environment.from_string(tree)
    return made


def _mark(node: nodes.Node, loop: int | None, numbers: Iterator[int]) -> None:
    """Put the marking calls into a syntax tree.

    Args:
        node: whose statements are looked at.
        loop: the number of the innermost loop around it.
        numbers: of the loops to come.
    """
    for field in ("body", "elif_", "else_"):
        statements = getattr(node, field, None)
        if not isinstance(statements, list):
            continue
        out: list[nodes.Node] = []
        for statement in statements:
            if isinstance(statement, nodes.For):
                number = next(numbers)
                _mark(statement, number, numbers)
                out += _marked_loop(statement, number)
            else:
                _mark(statement, loop, numbers)
                out.append(statement)
                if loop is not None and (name := _assigned(statement)):
                    out.append(_call("fedlora_named", loop, [name]))
        if field != "elif_":  # its members are conditions, which have statements of their own
            setattr(node, field, out)


def _marked_loop(loop: nodes.For, number: int) -> list[nodes.Node]:
    """A loop that marks its iterations, and its end: the last may be left by `break`."""
    if isinstance(loop.target, nodes.Name):
        names = [loop.target.name]
    else:
        names = [name.name for name in loop.target.find_all(nodes.Name)]
    begin, end = _call("fedlora_begin", number, names), _call("fedlora_end", number, [])
    loop.body = [begin, *loop.body, end]
    return [loop, _call("fedlora_end", number, [])]


def _assigned(statement: nodes.Node) -> str | None:
    """The variable of `{% set name = ... %}`; None for any other statement."""
    if isinstance(statement, nodes.Assign) and isinstance(statement.target, nodes.Name):
        return statement.target.name
    return None


def _call(function: str, loop: int, names: Sequence[str]) -> nodes.Output:
    arguments: list[nodes.Expr] = [nodes.Const(loop)]
    arguments += [nodes.Name(name, "load") for name in names]
    return nodes.Output([nodes.Call(nodes.Name(function, "load"), arguments, [], None, None)])


def _read(marked: str, number: int) -> Traced:
    """The text without its marks, and which of the messages each part of it was written for."""
    pieces: list[str] = []
    parts: list[list[Span]] = [[] for _ in range(number)]
    open_messages: list[int] = []  # innermost last
    length = rest = place = 0
    for mark in [*_MARK.finditer(marked), None]:
        piece = marked[place : mark.start() if mark else len(marked)]
        if piece and open_messages:
            rest = length + len(piece)
            parts[open_messages[-1]].append((length, rest))
        pieces.append(piece)
        length += len(piece)
        if mark:
            place = mark.end()
            if mark.group(1) is not None:
                open_messages.append(int(mark.group(1)))
            elif open_messages:
                open_messages.pop()
    return Traced("".join(pieces), [joined(spans) for spans in parts], rest)
