"""Tells for which message each character of a rendered conversation was written.

A chat template is a loop over messages. It is compiled once more, with a mark written where an
iteration begins and where it ends, so that a single rendering of the whole conversation tells the
messages apart. Rendering the messages one by one would not: a template may render the last turn
differently, leave turns out, or write what a tool answered inside the assistant's turn.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from typing import Any

from jinja2 import Template, nodes

from fedlora.data.spans import TextSpan, joined

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Traced:
    """A rendered conversation.

    Args:
        text: as `apply_chat_template` gives it.
        parts: for every message, the spans of the text that were written for it; none where the
            template leaves it out, several where other messages' text stands between.
        rest: number of the character at which the text of the last message written ends.
    """

    text: str
    parts: list[list[TextSpan]]
    rest: int

    def of(self, message: int) -> str:
        """The text that was written for a message, by its number."""
        return "".join(self.text[begin:end] for begin, end in self.parts[message])


def plain_rendering(
    tokenizer: Any, messages: Messages, extra: Mapping[str, Any], generation: bool = False
) -> str:
    """The conversation as `apply_chat_template` renders it.

    Args:
        tokenizer: of transformers, with a chat template.
        messages: as it takes them.
        extra: `tools` and whatever else the template is given.
        generation: with the prompt for the next assistant turn.
    """
    return str(
        tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=generation, **extra
        )
    )


def traced(
    tokenizer: Any, messages: Messages, extra: Mapping[str, Any], generation: bool = False
) -> Traced | None:
    """Render a conversation, and find for which message each of its characters was written.

    Args:
        tokenizer: of transformers.
        messages: as it takes them.
        extra: `tools` and whatever else the template is given.
        generation: with the prompt for the next assistant turn.

    Returns:
        None where nothing can be said: the template does not go through the messages one by one,
        or its marked copy writes another text.

    Raises:
        Exception: whatever the template raises.
    """
    text = plain_rendering(tokenizer, messages, extra, generation)
    settings = {key: value for key, value in extra.items() if key not in ("tools", "chat_template")}
    tools = extra.get("tools")
    template = _with_marks(tokenizer.get_chat_template(extra.get("chat_template"), tools))
    copies = _as_templates_see(messages)
    marks = _Marks(copies)
    marked = template.render(
        messages=copies,
        **{"tools": tools, "documents": None, **tokenizer.special_tokens_map, **settings},
        add_generation_prompt=generation,
        fedlora_begin=marks.begin,
        fedlora_assigned=marks.assigned,
        fedlora_end=marks.end,
    )
    trace = _trace(marked, len(messages))
    return trace if trace.text == text else None


def _as_templates_see(messages: Messages) -> list[dict[str, Any]]:
    """Copies of the messages as transformers makes them for a template.

    Values become plain ones, and what a model thought stands under every name that templates use.
    Versions of transformers without these two functions give a template the messages as they are.
    """
    from transformers.utils import chat_template_utils as utils

    plain: Callable[[Any], Any] = getattr(utils, "_plain_template_data", lambda value: value)
    alias: Callable[[Any], Any] = getattr(utils, "_alias_reasoning_fields", list)
    copies = [{k: plain(v) for k, v in message.items() if v is not None} for message in messages]
    return list(alias(copies))


# --- a template with marks ---

_MARK = re.compile("\ue000\uf8ff(?:(\\d+)|e)\ue001")
"""The beginning of a message's text, with its number, or its end. The characters around it are of
Unicode's private use, so that no text has them in a row."""


class _Marks:
    """Makes the marks that a template with marks writes: it calls these functions as it renders.

    A message is recognised by its identity, when a loop's variable or another one is set to it.

    Args:
        messages: the very objects that the template is given.
    """

    def __init__(self, messages: Sequence[dict[str, Any]]) -> None:
        self._number = {id(message): i for i, message in enumerate(messages)}
        self._open: set[int] = set()  # loops whose iteration is known to be a message's

    def begin(self, loop: int, *values: Any) -> str:
        """The mark where an iteration begins, in which the loop's variables have these values."""
        ended = self.end(loop)  # `continue` left the iteration before without its end
        return ended + self.assigned(loop, *values)

    def assigned(self, loop: int, *values: Any) -> str:
        """The mark where variables were set to these values, if one of them is a message.

        Templates that loop over numbers set a variable to a message inside of the loop.
        """
        if loop in self._open:
            return ""
        for value in values:
            if (number := self._number.get(id(value))) is not None:
                self._open.add(loop)
                return f"\ue000\uf8ff{number}\ue001"
        return ""

    def end(self, loop: int) -> str:
        """The mark where an iteration or its loop ends; empty where none is open."""
        if loop not in self._open:
            return ""
        self._open.remove(loop)
        return "\ue000\uf8ffe\ue001"


@lru_cache(maxsize=8)
def _with_marks(template: str) -> Template:
    """A chat template compiled with calls that mark where a loop's iterations begin and end."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    environment = _compile_jinja_template(template).environment
    tree = environment.parse(template)
    _insert_marks(tree, None, count())
    tree.set_environment(environment)
    compiled: Template = environment.from_string(tree)
    return compiled


def _insert_marks(node: nodes.Node, loop: int | None, numbers: Iterator[int]) -> None:
    """Put the calls that write marks into a syntax tree.

    Args:
        node: whose statements are looked at.
        loop: the number of the innermost loop around it; None: there is none.
        numbers: for the loops that are met, one each.
    """
    for field in ("body", "elif_", "else_"):
        statements = getattr(node, field, None)
        if not isinstance(statements, list):
            continue
        marked: list[nodes.Node] = []
        for statement in statements:
            if isinstance(statement, nodes.For):
                number = next(numbers)
                _insert_marks(statement, number, numbers)
                marked += _marked_loop(statement, number)
            else:
                _insert_marks(statement, loop, numbers)
                marked.append(statement)
                if loop is not None and (name := _assigned_name(statement)):
                    marked.append(_call("fedlora_assigned", loop, [name]))
        if field != "elif_":  # it holds conditions, whose own statements have been marked
            setattr(node, field, marked)


def _marked_loop(loop: nodes.For, number: int) -> list[nodes.Node]:
    """A loop that marks its iterations, and the end mark once more behind it.

    That one counts where `break` leaves the last iteration before its end.
    """
    if isinstance(loop.target, nodes.Name):
        names = [loop.target.name]
    else:
        names = [name.name for name in loop.target.find_all(nodes.Name)]
    begin, end = _call("fedlora_begin", number, names), _call("fedlora_end", number, [])
    loop.body = [begin, *loop.body, end]
    return [loop, _call("fedlora_end", number, [])]


def _assigned_name(statement: nodes.Node) -> str | None:
    """The variable of `{% set name = ... %}`; None for any other statement."""
    if isinstance(statement, nodes.Assign) and isinstance(statement.target, nodes.Name):
        return statement.target.name
    return None


def _call(function: str, loop: int, names: Sequence[str]) -> nodes.Output:
    """The statement `{{ function(loop, *names) }}`."""
    arguments: list[nodes.Expr] = [nodes.Const(loop)]
    arguments += [nodes.Name(name, "load") for name in names]
    return nodes.Output([nodes.Call(nodes.Name(function, "load"), arguments, [], None, None)])


def _trace(marked: str, number: int) -> Traced:
    """Take the marks out of a text, and tell by them for which message each part was written.

    Args:
        marked: the text with its marks.
        number: of messages.
    """
    pieces: list[str] = []
    parts: list[list[TextSpan]] = [[] for _ in range(number)]
    open_messages: list[int] = []  # innermost last
    position = 0  # in the marked text
    length = rest = 0  # of the text without marks; where the last message's text ends in it
    for mark in [*_MARK.finditer(marked), None]:
        piece = marked[position : mark.start() if mark else len(marked)]
        if piece and open_messages:
            rest = length + len(piece)
            parts[open_messages[-1]].append(TextSpan(length, rest))
        pieces.append(piece)
        length += len(piece)
        if mark:
            position = mark.end()
            if mark.group(1) is not None:
                open_messages.append(int(mark.group(1)))
            elif open_messages:
                open_messages.pop()
    return Traced("".join(pieces), [joined(spans) for spans in parts], rest)
