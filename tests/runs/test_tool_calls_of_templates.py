"""What is learnt of tool calls under every chat template that TRL ships."""

from __future__ import annotations

from typing import Any

import pytest

import fedlora
from fedlora.data.templates import UnusableRowError
from support.tokens import (
    MODELS,
    chat,
    learnt,
    of_model,
    stretches,
    templates_compiled_once,  # noqa: F401
    with_chat,
)
from support.tokens import chat_templates as shipped
from support.tool_calls import (
    CALLED,
    NO_CALLS,
    SPELLINGS,
    talk,
)

pytestmark = pytest.mark.usefixtures("templates_compiled_once")


def learnt_or_refused(tokenizer: Any, messages: list[dict[str, Any]]) -> tuple[list[str], str]:
    """What is learnt of the conversation, or what is said against it."""
    try:
        return learnt(tokenizer, chat(tokenizer, messages)), ""
    except (UnusableRowError, fedlora.InputError) as error:
        return [], str(error)


@pytest.mark.parametrize(
    "name",
    [p.stem for p in sorted(shipped().glob("*.jinja")) if not p.stem.endswith("_training")],
)
def test_what_any_template_learns_of_tools(name: str) -> None:
    """A row is learnt rightly or dropped with a reason, whatever the template can show."""
    tokenizer = of_model(name)
    for messages in (*SPELLINGS.values(), talk("Let me see."), talk("", "weather", "clock")):
        found, refused = learnt_or_refused(tokenizer, messages)
        if refused:
            assert name not in CALLED or "single tool-calls" in refused
            assert "chat template" in refused
            continue
        everything = "\n".join(found)
        assert not any(other in everything for other in ("SUNNY", "Rain?", "Thanks"))
        assert "No rain." in everything
        assert "Bye" in found[-1]
        assert "weather" in everything or "Let me see." in everything
        assert '"{' not in everything  # no JSON within JSON
        assert "{{" not in everything


@pytest.mark.parametrize("content", ["", "Let me see."])
@pytest.mark.parametrize("names", [("weather",), ("weather", "clock")])
@pytest.mark.parametrize(("name", "before", "after"), [m for m in MODELS if m[0] not in NO_CALLS])
def test_tool_calls_are_found_as_if_they_were_marked(
    name: str, before: str, after: tuple[str, ...], content: str, names: tuple[str, ...]
) -> None:
    """TRL's masks, but for what the prompt for generation says and what follows the turn's end."""
    tokenizer = of_model(name)
    messages = talk(content, *names)
    ours = chat(tokenizer, messages)
    training = (shipped() / f"{name}_training.jinja").read_text(encoding="utf-8")
    theirs = chat(with_chat(tokenizer, training), messages)
    assert ours["input_ids"] == theirs["input_ids"]
    head, tail = tokenizer(before)["input_ids"], tokenizer(after[0])["input_ids"]
    wanted = []
    for start, ids in stretches(theirs):
        begin = len(head) if ids[: len(head)] == head else 0
        if not begin and before:  # DeepSeek's prompt behind a tool is another
            begin = len(tokenizer("<｜tool▁outputs▁end｜>")["input_ids"])
        end = len(ids) - len(tail) if tail and ids[-len(tail) :] == tail else len(ids)
        wanted.append((start + begin, ids[begin:end]))
    assert stretches(ours) == wanted
