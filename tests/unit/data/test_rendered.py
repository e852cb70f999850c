"""What a template makes of a row."""

from __future__ import annotations

import dataclasses

import pytest

from fedlora.data.rendered import Chat, Classified, Turns
from fedlora.data.templates import TEMPLATES, classification


def test_every_template_gives_its_kind() -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert TEMPLATES["text"].render({"text": "a"}) == ("", "a")
    assert TEMPLATES["chat"].render({"messages": messages}) == Chat(messages, extra={})
    labelled = classification(None, None, ["text", "label"])
    assert labelled.render({"text": "a", "label": 1}) == Classified(("a",), "1")
    earlier = {"instruction": "c", "output": "d", "history": [["a", "b"]]}
    rendered = TEMPLATES["alpaca"].render(earlier)
    assert isinstance(rendered, Turns)
    assert [answer for _, answer in rendered.pairs] == ["b", "d"]


def test_a_rendered_row_is_never_changed() -> None:
    chat = Chat([])
    assert (chat.prompt, chat.extra, chat.left_out) == (None, None, frozenset())
    with pytest.raises(dataclasses.FrozenInstanceError):
        chat.prompt = 1  # type: ignore[misc]
