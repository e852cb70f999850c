"""Turns a row into a prompt and a completion, a conversation, or a text to classify."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter

from fedlora.data.cells import extra_of, numbers_of, text_of
from fedlora.data.chat_messages import UnusableRowError, json_of, messages_of, says
from fedlora.data.preferences import preference_of
from fedlora.data.rendered import Chat, Classified, Rendered, Turns
from fedlora.data.rows import Row, is_null, is_text
from fedlora.errors import InputError

BUILT_IN_CHAT = {"vicuna": Path(__file__).parent / "chat_templates" / "vicuna.jinja"}
"""Chat templates of the package, for tokenizers that have none."""


@dataclass(frozen=True)
class Template:
    """How a row is read.

    Args:
        name: what the key `template` says.
        columns: what every row must have; each entry is a tuple of columns, one of which is enough.
        render: `row -> Rendered`; raises `UnusableRowError` where nothing can be learnt from a row.
        optional: columns the data must have, but a row may leave empty.
        further: columns that are read where the data has them.
    """

    name: str
    columns: tuple[tuple[str, ...], ...]
    render: Callable[[Row], Rendered]
    optional: tuple[str, ...] = ()
    further: tuple[str, ...] = ()

    @property
    def reads(self) -> list[str]:
        """All columns that a row may be read from."""
        needed = (name for names in self.columns for name in names)
        return [*needed, *self.optional, *self.further]

    def missing(self, columns: Sequence[str]) -> list[str]:
        """What it needs and these columns lack; alternatives are joined by "or"."""
        absent = [" or ".join(names) for names in self.columns if not set(names) & set(columns)]
        return absent + [name for name in self.optional if name not in columns]


_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n"
)


def _alpaca(row: Row) -> tuple[str, str] | Turns:
    """Alpaca's prompt and response; with a history, all of its turns before them."""
    context = text_of(row, "input", "context").strip()
    question = f"### Instruction:\n{text_of(row, 'instruction')}"
    if context:
        question += f"\n\n### Input:\n{context}"
    preamble = _WITH_INPUT if context else _WITHOUT_INPUT
    if system := text_of(row, "system").strip():
        preamble = f"{system}\n\n{preamble}"
    pairs = [(f"### Instruction:\n{instruction}", answer) for instruction, answer in _history(row)]
    pairs.append((question, text_of(row, "output", "response")))
    turns: list[tuple[str, str]] = []
    for asked, answer in pairs:
        before = "\n\n" if turns else preamble
        turns.append((f"{before}{asked}\n\n### Response:\n", answer))
    return Turns(tuple(turns)) if turns[1:] else turns[0]


def _history(row: Row) -> list[tuple[str, str]]:
    """Earlier turns, as LLaMA-Factory has them: a list of instructions and responses."""
    history = row.get("history")
    if is_null(history):
        return []
    if isinstance(history, str):  # of a CSV file
        history = json_of("history", history)
    if not isinstance(history, list) or not all(
        isinstance(pair, list | tuple)
        and len(pair) == 2
        and all(is_text(value) and not is_null(value) for value in pair)
        for pair in history
    ):
        raise InputError(
            "the column history holds no list of [instruction, response] pairs: "
            f"{repr(history)[:60]}; mend it, or rename the column if it is something else"
        )
    return [(str(instruction), str(answer)) for instruction, answer in history]


def _chat(row: Row) -> Chat:
    """A conversation of the column messages, or of ShareGPT's conversations."""
    column = "conversations" if is_null(row.get("messages")) else "messages"
    messages, left_out = messages_of(row[column])
    system = text_of(row, "system").strip()
    if system and not any(message["role"] == "system" for message in messages[:1]):
        messages = [{"role": "system", "content": system}, *messages]
        left_out = [False, *left_out]
    if column == "conversations":
        # ShareGPT's conversations may begin in the middle: answers before the first question are
        # left out.
        first = int(bool(messages) and messages[0]["role"] == "system")
        while messages[first:] and messages[first]["role"] == "assistant":
            del messages[first], left_out[first]
    return _learnable(Chat(messages, None, extra_of(row), numbers_of(left_out)))


def _learnable(chat: Chat) -> Chat:
    """The conversation, if it has something to learn: a turn of the assistant's, or a completion.

    Raises:
        UnusableRowError: it has nothing.
    """
    answers = [
        i
        for i, message in enumerate(chat.messages)
        if i >= (chat.prompt or 0) and message["role"] == "assistant" and says(message)
    ]
    if chat.prompt is None and not answers:
        raise UnusableRowError("no assistant turn to learn")
    if answers and chat.left_out.issuperset(answers):
        raise UnusableRowError("no assistant turn to learn: all have weight 0")
    return chat


def _prompt_completion(row: Row) -> tuple[str, str] | Chat:
    """A prompt and its completion: two texts, or two lists of messages."""
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        asked, asked_left_out = messages_of(prompt)
        answered, answered_left_out = messages_of(completion)
        left_out = numbers_of([*asked_left_out, *answered_left_out])
        return _learnable(Chat([*asked, *answered], len(asked), extra_of(row), left_out))
    return text_of(row, "prompt"), text_of(row, "completion")


TEMPLATES = {
    t.name: t
    for t in (
        Template(
            "alpaca",
            (("instruction",), ("output", "response")),
            _alpaca,
            further=("input", "context", "system", "history"),
        ),
        Template(
            "preference",
            (("chosen",), ("rejected",)),
            preference_of,
            further=("prompt", "conversations", "system", "tools", "chat_template_kwargs"),
        ),
        Template(
            "chat",
            (("messages", "conversations"),),
            _chat,
            further=("system", "tools", "chat_template_kwargs"),
        ),
        Template(
            "prompt_completion",
            (("prompt",), ("completion",)),
            _prompt_completion,
            further=("tools", "chat_template_kwargs"),
        ),
        Template("text", (("text",),), lambda row: ("", text_of(row, "text"))),
    )
}


def custom(prompt: str, completion: str) -> Template:
    """A user's own template: `{column}` stands for a column, `{{` and `}}` for braces.

    Columns of the prompt may be empty in a row, those of the completion may not.

    Args:
        prompt: text of the prompt; empty: there is none.
        completion: text of the completion, with at least one column in it.

    Raises:
        InputError: unbalanced braces, or more than a column's name between them.
    """
    prompt_pieces = _parse("prompt_template", prompt)
    completion_pieces = _parse("completion_template", completion)
    names = [name for _, name in completion_pieces if name is not None]
    if not names:
        raise InputError(f"completion_template: {completion!r} names no {{column}} to learn")

    def render(row: Row) -> tuple[str, str]:
        return _fill(prompt_pieces, row), _fill(completion_pieces, row)

    optional = tuple(name for _, name in prompt_pieces if name is not None and name not in names)
    columns = tuple((name,) for name in names)
    return Template("custom", columns, render, optional)


def _parse(key: str, text: str) -> list[tuple[str, str | None]]:
    """The text of a configuration key in pieces: literal text, and the column behind it or None."""
    try:
        parts = list(Formatter().parse(text))
    except ValueError as error:
        raise InputError(
            f"{key}: {text!r}: {error}; write {{column}}, and {{{{ or }}}} for braces themselves"
        ) from None
    for _, name, form, conversion in parts:
        if name == "" or form or conversion:
            raise InputError(f"{key}: {text!r}: expected a column's name alone between braces")
    return [(literal, name) for literal, name, _, _ in parts]


def _fill(pieces: Sequence[tuple[str, str | None]], row: Row) -> str:
    """The text with a row's values in the place of its columns."""
    return "".join(
        literal + ("" if name is None else text_of(row, name)) for literal, name in pieces
    )


TEXT_COLUMNS = (
    ("text",),
    ("sentence",),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
)
"""Names under which a classifier's text is looked for: those of GLUE and common data sets."""
LABEL_COLUMNS = ("label", "labels")
"""Names under which a classifier's labels are looked for."""


def classification(
    texts: Sequence[str] | None, label: str | None, columns: Sequence[str]
) -> Template:
    """The template of a classifier: one text column or a pair, and a label.

    Args:
        texts: the text columns; None: they are looked for (`TEXT_COLUMNS`).
        label: the label column; None: it is looked for (`LABEL_COLUMNS`).
        columns: of the data.

    Raises:
        InputError: the columns are not there; the message lists those present.
    """
    present = ", ".join(columns)
    if texts is None:
        texts = next((t for t in TEXT_COLUMNS if set(t) <= set(columns)), None)
        if texts is None:
            raise InputError(f"text_column_names: name the text's column; the data has {present}")
    if label is None:
        label = next((name for name in LABEL_COLUMNS if name in columns), None)
        if label is None:
            raise InputError(f"label_column_name: name the label's column; the data has {present}")
    for key, names in (("text_column_names", texts), ("label_column_name", [label])):
        for name in names:
            if name not in columns:
                raise InputError(f"{key}: {name!r} is not a column; the data has {present}")
    text_columns, label_column = tuple(texts), label

    def render(row: Row) -> Classified:
        text = tuple(text_of(row, name) for name in text_columns)
        return Classified(text, label_of(row, label_column))

    columns_needed = tuple((name,) for name in (*text_columns, label_column))
    return Template("classification", columns_needed, render)


def label_of(row: Row, column: str) -> str:
    """A row's label as text, such as `positive` or `3`.

    Raises:
        InputError: it is neither text nor a whole number.
    """
    value = row[column]
    if isinstance(value, float) or not isinstance(value, str | int):
        raise InputError(
            f"label_column_name: {column} holds {value!r}; expected text or whole numbers"
        )
    return str(value)


def choose_template(
    name: str,
    columns: Sequence[str],
    *,
    prompt_template: str | None = None,
    completion_template: str | None = None,
) -> Template:
    """The template of that name, or with "auto" the first whose columns are all there.

    Args:
        name: the key `template`.
        columns: of the data.
        prompt_template, completion_template: texts of a user's own template, which goes before.

    Raises:
        InputError: a column is missing; the message lists those present.
    """
    if completion_template:
        chosen = custom(prompt_template or "", completion_template)
    elif name != "auto":
        chosen = TEMPLATES[name]
    else:
        fitting = [t for t in TEMPLATES.values() if not t.missing(columns)]
        if not fitting:
            raise InputError(
                f"template: no template fits the columns {', '.join(columns)}; known are "
                + "; ".join(
                    f"{t.name} ({', '.join(' or '.join(c) for c in t.columns)})"
                    for t in TEMPLATES.values()
                )
                + "; for others write prompt_template and completion_template, or name "
                "label_column_name to classify"
            )
        return fitting[0]
    if absent := chosen.missing(columns):
        raise InputError(
            f"template: {chosen.name} needs the column {', '.join(absent)}; the data has "
            f"{', '.join(columns)}"
        )
    return chosen
