"""Tokens and labels are those written out by hand, of any template and any tokenizer.

The comparison with TRL is in tests/runs/test_tokens_like_trl.py.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

import fedlora
from fedlora import Config
from fedlora.data.datasets import FederatedData, load_data
from fedlora.data.rendered import Classified
from fedlora.data.templates import (
    TEMPLATES,
    Template,
    UnusableRowError,
    choose_template,
    classification,
    custom,
)
from fedlora.data.tokenize import IGNORE, Tokens, tokenize
from support.rows import write_jsonl
from support.tokens import (
    BARE,
    CHATML,
    MARKED_CHATML,
    MODELS,
    any_tokenizer,  # noqa: F401
    byte_level,
    chat,
    chat_templates,
    learnt,
    letters,  # noqa: F401
    of_model,
    stretches,
    templates_compiled_once,  # noqa: F401
    turns,
    vicuna,  # noqa: F401
    with_chat,
)

pytestmark = pytest.mark.usefixtures("templates_compiled_once")


Written = Sequence[tuple[str, bool]]
"""A text in pieces, each learnt or not."""


ZEPHYR = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def characters(tokenizer: Any, text: str) -> list[int]:
    """A token per character, `<s>` and `</s>` one each, looked up one by one."""
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[piece] for piece in re.findall(r"</?s>|.", text, re.DOTALL)]


def by_hand(tokenizer: Any, pieces: Written) -> Tokens:
    """What tokenize should give for a text that is learnt in part."""
    ids = [(token, learn) for text, learn in pieces for token in characters(tokenizer, text)]
    return {
        "input_ids": [token for token, _ in ids],
        "labels": [token if learn else IGNORE for token, learn in ids],
    }


ADD = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\nAdd.\n\n### Response:\n"
)


ADD_THESE = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
    "Add.\n\n### Input:\n2 and 3\n\n### Response:\n"
)


BRACES = custom('{{"q": "{question}", "hint": "{hint}"}}\n', "{{{answer}}}!")


TWO_TURNS: Written = [
    ("<|user|>\nhi</s>\n<|assistant|>\n", False),
    ("hello</s>", True),
    ("\n<|user|>\nand?</s>\n<|assistant|>\n", False),
    ("bye</s>", True),
    ("\n", False),
]


WITH_SYSTEM: Written = [("<|system|>\nBe kind.</s>\n", False), *TWO_TURNS]


def shared(*pairs: tuple[str, str], key: str = "conversations") -> dict[str, Any]:
    """A conversation as ShareGPT has it."""
    return {"id": "a_0", key: [{"from": who, "value": text} for who, text in pairs]}


WRITTEN: list[tuple[str, Template, dict[str, Any], Written]] = [
    (
        "alpaca",
        TEMPLATES["alpaca"],
        {"instruction": "Add.", "input": "2 and 3", "output": "5"},
        [(ADD_THESE, False), ("5</s>", True)],
    ),
    (
        "alpaca without input",
        TEMPLATES["alpaca"],
        {"instruction": "Add.", "input": "", "output": "5"},
        [(ADD, False), ("5</s>", True)],
    ),
    (
        "Dolly",
        TEMPLATES["alpaca"],
        {"instruction": "Add.", "context": "2 and 3", "response": "5", "category": "math"},
        [(ADD_THESE, False), ("5</s>", True)],
    ),
    (
        "Dolly without context",
        TEMPLATES["alpaca"],
        {"instruction": "Add.", "context": "", "response": "5", "category": "math"},
        [(ADD, False), ("5</s>", True)],
    ),
    (
        "prompt and completion",
        TEMPLATES["prompt_completion"],
        {"prompt": "2 + 3 =", "completion": " 5\n"},
        [("2 + 3 =", False), (" 5\n</s>", True)],
    ),
    (
        "an empty completion",
        TEMPLATES["prompt_completion"],
        {"prompt": "stop", "completion": ""},
        [("stop", False), ("</s>", True)],
    ),
    ("text", TEMPLATES["text"], {"text": "Once upon"}, [("Once upon</s>", True)]),
    (
        "custom",
        BRACES,
        {"question": "2+3", "hint": "{sum}", "answer": 5},
        [('{"q": "2+3", "hint": "{sum}"}\n', False), ("{5}!</s>", True)],
    ),
    (
        "custom, empty column",
        BRACES,
        {"question": "2+3", "hint": None, "answer": "5"},
        [('{"q": "2+3", "hint": ""}\n', False), ("{5}!</s>", True)],
    ),
    ("messages", TEMPLATES["chat"], {"messages": turns("hi", "hello", "and?", "bye")}, TWO_TURNS),
    (
        "messages with a system turn",
        TEMPLATES["chat"],
        {"messages": turns("hi", "hello", "and?", "bye", system="Be kind.")},
        WITH_SYSTEM,
    ),
    (
        "messages that end with the user's turn",
        TEMPLATES["chat"],
        {"messages": turns("hi", "hello", "and?")},
        [*TWO_TURNS[:2], ("\n<|user|>\nand?</s>\n", False)],
    ),
    (
        "messages, an empty turn",
        TEMPLATES["chat"],
        {"messages": turns("hi", "", "and?", "bye")},
        [
            ("<|user|>\nhi</s>\n<|assistant|>\n</s>\n<|user|>\nand?</s>\n<|assistant|>\n", False),
            *TWO_TURNS[3:],
        ],
    ),
    (
        "messages, turns alike",
        TEMPLATES["chat"],
        {"messages": turns("ok", "ok", "ok", "ok")},
        [
            ("<|user|>\nok</s>\n<|assistant|>\n", False),
            ("ok</s>", True),
            ("\n<|user|>\nok</s>\n<|assistant|>\n", False),
            ("ok</s>", True),
            ("\n", False),
        ],
    ),
    (
        "ShareGPT",
        TEMPLATES["chat"],
        shared(("human", "hi"), ("gpt", "hello"), ("human", "and?"), ("gpt", "bye")),
        TWO_TURNS,
    ),
    (
        "ShareGPT, all speakers",
        TEMPLATES["chat"],
        shared(
            ("system", "Be kind."),
            ("user", "hi"),
            ("chatgpt", "hello"),
            ("human", "and?"),
            ("assistant", "bye"),
        ),
        WITH_SYSTEM,
    ),
    (
        "ShareGPT, other assistants",
        TEMPLATES["chat"],
        shared(("human", "hi"), ("bing", "hello"), ("human", "and?"), ("bard", "bye")),
        TWO_TURNS,
    ),
    (
        "ShareGPT from the middle",
        TEMPLATES["chat"],
        shared(
            ("gpt", "as I said"),
            ("gpt", "and so on"),
            ("human", "hi"),
            ("gpt", "hello"),
            ("human", "and?"),
            ("gpt", "bye"),
        ),
        TWO_TURNS,
    ),
    (
        "ShareGPT in messages",
        TEMPLATES["chat"],
        shared(
            ("human", "hi"), ("gpt", "hello"), ("human", "and?"), ("gpt", "bye"), key="messages"
        ),
        TWO_TURNS,
    ),
    (
        "conversational prompt and completion",
        TEMPLATES["prompt_completion"],
        {"prompt": turns("hi", "hello", "and?"), "completion": turns("", "bye")[1:]},
        [("".join(text for text, _ in TWO_TURNS[:3]), False), ("bye</s>\n", True)],
    ),
]


@pytest.mark.parametrize(
    ("template", "row", "pieces"), [w[1:] for w in WRITTEN], ids=[w[0] for w in WRITTEN]
)
def test_every_template_token_by_token(
    template: Template, row: dict[str, Any], pieces: Written, letters: Any
) -> None:
    tokenizer = with_chat(letters, ZEPHYR)
    given = copy.deepcopy(row)
    assert tokenize(row, template, tokenizer, 1000, True) == by_hand(tokenizer, pieces)
    everything = [(text, True) for text, _ in pieces]
    assert tokenize(row, template, tokenizer, 1000, False) == by_hand(tokenizer, everything)
    assert row == given
    # Cut to just behind the first token that is learnt, and to just before it.
    first = next(i for i, label in enumerate(by_hand(letters, pieces)["labels"]) if label >= 0)
    whole = by_hand(letters, pieces)
    if first:
        assert tokenize(row, template, tokenizer, first + 1, True) == {
            key: value[: first + 1] for key, value in whole.items()
        }
        with pytest.raises(UnusableRowError, match=f"max_length {first}, .* no token left"):
            tokenize(row, template, tokenizer, first, True)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (shared(), "no assistant turn to learn"),
        (shared(("human", "hi")), "no assistant turn to learn"),
        (shared(("gpt", "as I said")), "no assistant turn to learn"),
        (shared(("human", "hi"), ("gpt", "")), "no assistant turn to learn"),
        (shared(("human", "hi"), ("narrator", "hello")), "unknown speaker 'narrator'"),
        ({"messages": turns("hi", "")}, "no assistant turn to learn"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "a part that is no text: im",
        ),
    ],
)
def test_conversations_that_teach_nothing(row: dict[str, Any], reason: str, letters: Any) -> None:
    with pytest.raises(UnusableRowError, match=reason):
        tokenize(row, TEMPLATES["chat"], with_chat(letters, ZEPHYR), 1000, True)


def test_unusable_conversations_are_left_out_and_counted(letters: Any, tmp_path: Path) -> None:
    good = shared(("human", "hi"), ("gpt", "hello"), ("human", "and?"), ("gpt", "bye"))
    bad = [shared(), shared(("human", "hi"), ("narrator", "x")), shared(("gpt", "as I said"))]
    write_jsonl(tmp_path / "x.jsonl", [good, bad[0], good, bad[1], good, bad[2]])
    config = Config(train_file=str(tmp_path / "x.jsonl"), num_clients=1)
    data = load_data(config, with_chat(letters, ZEPHYR))
    assert data.template == "chat"
    assert data.clients[0].train == [by_hand(letters, TWO_TURNS)] * 3
    assert data.dropped == {"no assistant turn to learn": 2, "unknown speaker 'narrator'": 1}


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("hi", "a list of turns, each with role and content"),
        (["hi"], "a list of turns, each with role and content"),
        ([{"speaker": "x", "text": "y"}], "role and content .* in every turn; got speaker, text"),
    ],
)
def test_what_is_no_conversation_is_refused(value: Any, says: str, letters: Any) -> None:
    """Not a matter of one row: the column is another than the user thinks."""
    with pytest.raises(fedlora.InputError, match=says):
        tokenize({"messages": value}, TEMPLATES["chat"], with_chat(letters, ZEPHYR), 1000, True)


def of_custom(path: Path, letters: Any, rows: list[dict[str, Any]], **values: str) -> FederatedData:
    """Rows read by a custom template, one client."""
    write_jsonl(path / "x.jsonl", rows)
    return load_data(Config(train_file=str(path / "x.jsonl"), num_clients=1, **values), letters)


def test_a_custom_template_reads_a_file(letters: Any, tmp_path: Path) -> None:
    data = of_custom(
        tmp_path,
        letters,
        [{"question": "2+3", "answer": 5}, {"question": None, "answer": 6}],
        prompt_template="{{Q}} {question}\n",
        completion_template="{answer}",
    )
    assert data.template == "custom"
    assert {tuple(row["input_ids"]): row for row in data.clients[0].train} == {
        tuple(row["input_ids"]): row
        for row in (
            by_hand(letters, [("{Q} 2+3\n", False), ("5</s>", True)]),
            by_hand(letters, [("{Q} \n", False), ("6</s>", True)]),
        )
    }


def test_a_custom_template_needs_its_columns(letters: Any, tmp_path: Path) -> None:
    rows = [{"question": "2+3", "answer": "5"}, {"question": "4", "answer": None}]
    for values in (
        {"prompt_template": "{quesion}", "completion_template": "{answer}"},
        {"prompt_template": "{question.real}", "completion_template": "{answer}"},
        {"prompt_template": "{question[0]}", "completion_template": "{answer}"},
        {"prompt_template": "{question}", "completion_template": "{solution}"},
    ):
        with pytest.raises(
            fedlora.InputError,
            match=r"custom needs the column (quesion|question\.real|question\[0\]|solution); "
            "the data has question, answer",
        ):
            of_custom(tmp_path, letters, rows, **values)
    # What is to be learnt may be empty in no row.
    with pytest.raises(fedlora.InputError, match="row 2 has no answer"):
        of_custom(tmp_path, letters, rows, completion_template="{answer}")


@pytest.mark.parametrize(
    ("prompt", "completion", "says"),
    [
        ("{question", "{answer}", "prompt_template: .*expected '}'.*for braces themselves"),
        ("question}", "{answer}", "prompt_template: .*Single '}'"),
        ("{question}", "{answer", "completion_template: .*expected '}'"),
        ("{}", "{answer}", "prompt_template: .*a column's name alone"),
        ("{question:>8}", "{answer}", "prompt_template: .*a column's name alone"),
        ("{question!r}", "{answer}", "prompt_template: .*a column's name alone"),
        ("{question:{width}}", "{answer}", "prompt_template: .*a column's name alone"),
        ("{question}", "answer", r"completion_template: 'answer' names no \{column\}"),
        ("{question}", "{{answer}}", r"completion_template: .* names no \{column\}"),
    ],
)
def test_malformed_custom_templates_are_refused(prompt: str, completion: str, says: str) -> None:
    with pytest.raises(fedlora.InputError, match=says):
        choose_template(
            "custom",
            ["question", "answer"],
            prompt_template=prompt,
            completion_template=completion,
        )


@pytest.fixture(scope="session")
def pieces_of_words() -> Any:
    """Like BERT's: pairs have their own special tokens and types."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "film", "##s"]
    core = Tokenizer(models.WordPiece(vocab={w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )


def test_a_text_and_its_label(pieces_of_words: Any, letters: Any) -> None:
    template = classification(None, None, ["label", "text"])
    names = ("neg", "pos")
    row = {"text": "good films", "label": "pos"}
    assert template.render(row) == Classified(("good films",), "pos")
    assert tokenize(row, template, pieces_of_words, 100, True, names) == {
        "input_ids": [2, 4, 6, 7, 3],
        "token_type_ids": [0, 0, 0, 0, 0],
        "label": 1,
    }
    # Cut, a text keeps the special tokens it is classified by.
    assert tokenize(row, template, pieces_of_words, 3, True, names) == {
        "input_ids": [2, 4, 3],
        "token_type_ids": [0, 0, 0],
        "label": 1,
    }
    # A tokenizer that knows no types gives none, and one without special tokens no token at all
    # for an empty text.
    assert tokenize({"text": "ok", "label": "neg"}, template, letters, 100, True, names) == {
        "input_ids": characters(letters, "ok"),
        "label": 0,
    }
    with pytest.raises(UnusableRowError, match="the text is empty"):
        tokenize({"text": "", "label": "neg"}, template, letters, 100, True, names)
    with pytest.raises(fedlora.InputError, match="the label 'meh'; known are neg, pos"):
        tokenize({"text": "x", "label": "meh"}, template, letters, 100, True, names)


def test_a_pair_and_its_label(pieces_of_words: Any) -> None:
    template = classification(None, None, ["sentence1", "sentence2", "label"])
    row = {"sentence1": "good film", "sentence2": "bad", "label": 2}
    assert tokenize(row, template, pieces_of_words, 100, True, ("0", "1", "2")) == {
        "input_ids": [2, 4, 6, 3, 5, 3],
        "token_type_ids": [0, 0, 0, 0, 1, 1],
        "label": 2,
    }


def test_label_ids_are_in_natural_order_or_as_named(pieces_of_words: Any, tmp_path: Path) -> None:
    rows = [{"text": "good " * (label + 1), "label": label} for label in (10, 2, 1, 2)]
    write_jsonl(tmp_path / "x.jsonl", rows)
    values = {"train_file": str(tmp_path / "x.jsonl"), "num_clients": 1}
    for named, order in ((None, ("1", "2", "10")), (["10", "1", "2"], ("10", "1", "2"))):
        config = Config(**values, label_column_name="label", label_names=named)
        data = load_data(config, pieces_of_words)
        assert data.label_names == order
        found = {(len(r["input_ids"]) - 3, order[r["label"]]) for r in data.clients[0].train}
        assert found == {(10, "10"), (2, "2"), (1, "1")}


@pytest.mark.parametrize("label", [0.5, None, ["a"]])
def test_labels_that_are_no_classes_are_refused(label: Any, letters: Any) -> None:
    template = classification(["text"], "label", ["text", "label"])
    with pytest.raises(fedlora.InputError, match="label_column_name: label holds"):
        tokenize({"text": "x", "label": label}, template, letters, 100, True, ("0", "1"))


TALK = turns("Hi there", "Hello,\nfriend: <b>1</b>", "What 's now?", "Nothing.", "So", "  Hello, ")


PLAIN = turns("Hi there", "Hello, friend.", "What now?", "Nothing.")


@pytest.mark.parametrize("talk", [PLAIN, TALK], ids=["plain", "odd"])
@pytest.mark.parametrize(("name", "before", "after"), MODELS, ids=[model[0] for model in MODELS])
def test_turns_are_found_as_if_they_were_marked(
    name: str, before: str, after: tuple[str, ...], talk: list[dict[str, Any]]
) -> None:
    tokenizer = of_model(name)
    assert "generation %" not in tokenizer.chat_template
    ours = chat(tokenizer, talk)
    training = (chat_templates() / f"{name}_training.jinja").read_text(encoding="utf-8")
    theirs = chat(with_chat(tokenizer, training), talk)
    assert ours["input_ids"] == theirs["input_ids"]
    # Whatever only TRL learns before a turn, the prompt for generation has said already.
    prompt = tokenizer.apply_chat_template(talk[:1], tokenize=False, add_generation_prompt=True)
    assert before in prompt.partition("Hi there")[2]
    number = sum(message["role"] == "assistant" for message in talk)
    wanted = []
    for turn, (start, ids) in enumerate(stretches(theirs), 1):
        left_out = after[-1] if turn == number else after[0]
        head = tokenizer(before)["input_ids"]
        tail = tokenizer(left_out)["input_ids"]
        assert (ids[: len(head)], ids[len(ids) - len(tail) :]) == (head, tail)
        wanted.append((start + len(head), ids[len(head) : len(ids) - len(tail)]))
    assert len(wanted) == number
    assert stretches(ours) == wanted


@pytest.mark.parametrize(
    "name", ["glm4moe", "qwen3", "qwen3_5_nothink", "qwen3_5_think", "qwen3_6"]
)
def test_templates_compared_with_no_markers_render_another_text(name: str) -> None:
    """What TRL marks in another text says nothing; these are written out below instead."""
    tokenizer = of_model(name)
    training = (chat_templates() / f"{name}_training.jinja").read_text(encoding="utf-8")
    assert chat(tokenizer, PLAIN) != chat(with_chat(tokenizer, training), PLAIN)
    texts = [
        found.apply_chat_template(PLAIN, tokenize=False)
        for found in (tokenizer, with_chat(tokenizer, training))
    ]
    assert texts[0] != texts[1]
    assert name not in [model[0] for model in MODELS]


def test_thoughts_of_qwen3() -> None:
    """Earlier thoughts are not in the text; the last turn's are, if empty, and are learnt."""
    tokenizer = of_model("qwen3")
    thoughtful = turns(
        "Hi", "<think>\nsmile\n</think>\n\nHello", "So?", "<think>\nleave\n</think>\n\nBye"
    )
    rest = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
    for talk, last in (
        (turns("Hi", "Hello", "So?", "Bye"), "<think>\n\n</think>\n\nBye<|im_end|>"),
        (thoughtful, "<think>\nleave\n</think>\n\nBye<|im_end|>"),
    ):
        found = chat(tokenizer, talk)
        assert tokenizer.decode(found["input_ids"]) == (
            f"{rest}<|im_start|>user\nSo?<|im_end|>\n<|im_start|>assistant\n{last}\n"
        )
        assert learnt(tokenizer, found) == ["Hello<|im_end|>", last]


def test_thoughts_of_qwen3_5_and_glm() -> None:
    """What the prompt for generation has opened is not learnt, what closes it is."""
    tokenizer = of_model("qwen3_5_think")
    assert learnt(tokenizer, chat(tokenizer, PLAIN)) == [
        "Hello, friend.<|im_end|>",
        "\n</think>\n\nNothing.<|im_end|>",
    ]
    tokenizer = of_model("qwen3_5_nothink")
    assert learnt(tokenizer, chat(tokenizer, PLAIN)) == [
        "Hello, friend.<|im_end|>",
        "Nothing.<|im_end|>",
    ]
    # GLM's turns end where another speaker begins; after the last, the text ends.
    tokenizer = of_model("glm4moe")
    assert learnt(tokenizer, chat(tokenizer, PLAIN)) == [
        "\n<think></think>\nHello, friend.<|user|>",
        "\n<think></think>\nNothing.<|endoftext|>",
    ]


@pytest.mark.parametrize("name", ["qwen3_5_think", "qwen3_6", "deepseek_r1_distill"])
def test_an_answer_that_begins_like_a_thought_is_learnt_whole(name: str) -> None:
    """The prompt for generation ends with `<think>`, which an answer's `<b>` shares a `<` with."""
    tokenizer = of_model(name)
    found = learnt(tokenizer, chat(tokenizer, turns("Hi", "<b>Hello</b>", "So?", "<b>Bye</b>")))
    assert found[0].startswith("<b>Hello</b>")
    assert "<b>Bye</b>" in found[1]


def test_what_tools_answer_is_not_learnt() -> None:
    """Qwen3 leaves thoughts out of earlier turns once the user speaks again."""
    tokenizer = of_model("qwen3")
    talk = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "<think>\nask\n</think>\n\nLet me see."},
        {"role": "tool", "content": "rain"},
        {"role": "assistant", "content": "<think>\nsay\n</think>\n\nIt rains."},
        {"role": "user", "content": "Thanks"},
        {"role": "assistant", "content": "Welcome"},
    ]
    assert learnt(tokenizer, chat(tokenizer, talk[:4])) == [
        "<think>\nask\n</think>\n\nLet me see.<|im_end|>",
        "<think>\nsay\n</think>\n\nIt rains.<|im_end|>",
    ]
    assert learnt(tokenizer, chat(tokenizer, talk)) == [
        "Let me see.<|im_end|>",
        "It rains.<|im_end|>",
        "<think>\n\n</think>\n\nWelcome<|im_end|>",
    ]


@pytest.mark.parametrize("name", ["idefics3", "smolvlm", "llava_next"])
def test_templates_that_leave_the_text_out_are_refused(name: str) -> None:
    """They take content in parts; of a text they render nothing, or fail."""
    tokenizer = of_model(name)
    with pytest.raises((UnusableRowError, fedlora.InputError), match="chat template"):
        chat(tokenizer, PLAIN)


def test_a_template_without_an_end_of_turn_gets_the_end_of_text(letters: Any) -> None:
    """Else the model would never learn to stop."""
    tokenizer = with_chat(letters, BARE)
    found = chat(tokenizer, turns("hi", "hello", "and?", "bye"))
    assert tokenizer.decode(found["input_ids"]) == "Q: hi\nA: hello\nQ: and?\nA: bye\n</s>"
    assert learnt(tokenizer, found)[0].strip() == "hello"
    assert "".join(learnt(tokenizer, found)[1:]) == "bye\n</s>"
    # One that ends the text itself gets no second, and a user's last turn no end to learn.
    found = chat(with_chat(letters, BARE + "{{ eos_token }}"), turns("hi", "hello"))
    assert tokenizer.decode(found["input_ids"]) == "Q: hi\nA: hello\n</s>"
    found = chat(tokenizer, turns("hi", "hello", "and?"))
    assert tokenizer.decode(found["input_ids"]) == "Q: hi\nA: hello\nQ: and?\n"


def test_an_end_of_turn_that_is_no_token_of_its_own_is_learnt(letters: Any) -> None:
    """As when a model without ChatML's tokens is given ChatML's template."""
    tokenizer = with_chat(letters, CHATML)
    found = chat(tokenizer, turns("hi", "hello", "and?", "bye"))
    assert tokenizer.decode(found["input_ids"]).startswith(
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>\n"
    )
    first, *last = learnt(tokenizer, found)
    assert first == "hello<|im_end|>"
    assert last[0].startswith("bye<|im_end|>")


def test_a_conversation_that_the_assistant_opens() -> None:
    """Markers or none, a greeting is a turn as any; there is no prompt before it to render."""
    tokenizer = byte_level(["<|im_start|>", "<|im_end|>"])
    talk = [{"role": "assistant", "content": "Welcome"}, *turns("hi", "hello")]
    marked = chat(with_chat(tokenizer, MARKED_CHATML), talk)
    assert learnt(tokenizer, marked) == ["Welcome<|im_end|>", "hello<|im_end|>"]
    assert chat(with_chat(tokenizer, CHATML), talk) == marked


def test_characters_of_private_use_are_text_as_any() -> None:
    """Pages copied from the web have them where icons were."""
    talk = turns("\ue000 menu", "a \ue000 menu \ue000", "so?", "\ue000", "now\ue000", "yes")
    tokenizer = with_chat(byte_level(["<|im_start|>", "<|im_end|>"]), CHATML)
    wanted = [f"{message['content']}<|im_end|>" for message in talk[1::2]]
    assert learnt(tokenizer, chat(tokenizer, talk)) == wanted


@pytest.mark.parametrize("template", [CHATML, BARE])
@pytest.mark.parametrize("answer", ["Yes, the answer", "  two spaces", "\nParis", "yes"])
def test_a_turn_begins_where_a_completion_would(
    template: str, answer: str, any_tokenizer: Any
) -> None:
    """A token that the prompt for generation and the answer share is learnt, as by TRL."""
    tokenizer = with_chat(any_tokenizer, template)
    talk = turns("What is the capital of France?", answer)
    whole = chat(tokenizer, talk)
    as_completion = tokenize(
        {"prompt": talk[:1], "completion": talk[1:]},
        TEMPLATES["prompt_completion"],
        tokenizer,
        1000,
        True,
    )
    number = len(as_completion["input_ids"])
    assert whole["input_ids"][:number] == as_completion["input_ids"]
    assert stretches(whole)[0][0] == stretches(as_completion)[0][0]


def test_spaces_are_learnt_however_the_tokenizer_counts_them() -> None:
    """Some tokenizers say of a space that it stands nowhere."""
    talk = turns("code", "def area(width):\n    if width:\n        return  1\n    return 2  ")
    found = [
        chat(with_chat(byte_level(["<|im_start|>", "<|im_end|>"], trim=trim), CHATML), talk)
        for trim in (False, True)
    ]
    assert found[0] == found[1]
    tokenizer = byte_level(["<|im_start|>", "<|im_end|>"])
    assert learnt(tokenizer, found[1]) == [f"{talk[1]['content']}<|im_end|>"]


def test_a_row_that_the_chat_template_refuses(letters: Any) -> None:
    refuses = "{{ raise_exception('No\n system') }}"
    refuses = "{% if messages[0]['role'] == 'system' %}" + refuses + "{% endif %}"
    tokenizer = with_chat(letters, refuses + ZEPHYR)
    assert chat(tokenizer, turns("hi", "hello", "and?", "bye")) == by_hand(letters, TWO_TURNS)
    with pytest.raises(UnusableRowError, match="the chat template refuses it: No system"):
        chat(tokenizer, turns("hi", "hello", system="Be kind."))


@pytest.mark.parametrize("column", ["messages", "prompt"])
def test_a_tokenizer_without_a_chat_template_says_what_to_give(column: str, letters: Any) -> None:
    row: Mapping[str, Any] = {"messages": turns("hi", "hello")}
    template = TEMPLATES["chat"]
    if column == "prompt":
        row = {"prompt": turns("hi"), "completion": turns("", "hello")[1:]}
        template = TEMPLATES["prompt_completion"]
    with pytest.raises(fedlora.InputError, match=r"chat_template_path.*vicuna"):
        tokenize(row, template, letters, 100, True)


def test_named_chat_templates(letters: Any) -> None:
    """A tokenizer may have several; without a default one, none is chosen for the user."""
    talk = turns("hi", "hello", "and?", "bye")
    tokenizer = copy.deepcopy(letters)
    tokenizer.chat_template = {"rag": "no", "default": ZEPHYR}
    assert chat(tokenizer, talk) == by_hand(letters, TWO_TURNS)
    tokenizer.chat_template = {"rag": "no"}
    with pytest.raises(fedlora.InputError, match="chat template"):
        chat(tokenizer, talk)


VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)


IN_VICUNA: Written = [
    (f"<s>{VICUNA_SYSTEM} USER: hi ASSISTANT:", False),
    (" hello</s>", True),
    ("USER: next ASSISTANT:", False),
    (" bye</s>", True),
]


def test_vicuna_written_out(letters: Any, vicuna: str) -> None:
    tokenizer = with_chat(letters, vicuna)
    talk = turns("hi", "hello", "next", "bye")
    assert chat(tokenizer, talk) == by_hand(letters, IN_VICUNA)
    # Spaces around turns are no part of the format.
    assert chat(tokenizer, turns(" hi\n", "\nhello ", "next", " bye\n\n")) == by_hand(
        letters, IN_VICUNA
    )
    # A system turn takes the place of its own.
    assert chat(tokenizer, turns("hi", "hello", system="Be kind.")) == by_hand(
        letters, [("<s>Be kind. USER: hi ASSISTANT:", False), (" hello</s>", True)]
    )
    # The prompt for generation is what stands before an answer.
    prompt = tokenizer.apply_chat_template(talk[:3], tokenize=False, add_generation_prompt=True)
    assert prompt == "".join(text for text, _ in IN_VICUNA[:3])
    with pytest.raises(UnusableRowError, match=r"refuses it: vicuna knows .* not tool"):
        chat(tokenizer, [*talk[:2], {"role": "tool", "content": "x"}])


def test_vicuna_begins_once_whatever_the_tokenizer_adds(any_tokenizer: Any, vicuna: str) -> None:
    tokenizer = with_chat(any_tokenizer, vicuna)
    end = tokenizer.eos_token_id
    found = chat(tokenizer, turns("The river", "the stones", "What is", "Yes"))
    assert found["input_ids"].count(tokenizer.bos_token_id) == 1
    assert found["input_ids"][0] == tokenizer.bos_token_id
    assert found["input_ids"].count(end) == 2
    parts = stretches(found)
    assert [ids[-1] for _, ids in parts] == [end, end]
    assert [tokenizer.decode(ids[:-1]).strip() for _, ids in parts] == ["the stones", "Yes"]


def of_client(path: Path, name: str, rows: list[dict[str, Any]], tokenizer: Any) -> FederatedData:
    """A file of one client, read without any setting about its columns."""
    (path / name).write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return load_data(Config(train_file=str(path / name), num_clients=1), tokenizer)


def in_any_order(rows: Sequence[Tokens]) -> list[tuple[list[int], list[int]]]:
    """Rows to compare: which of a client's rows comes first is drawn."""
    return sorted((row["input_ids"], row["labels"]) for row in rows)


ADD_ROWS: list[Written] = [
    [(ADD_THESE, False), ("5</s>", True)],
    [(ADD, False), ("6</s>", True)],
]


PUBLISHED: dict[str, tuple[list[dict[str, Any]], list[Written], str]] = {
    "Dolly": (
        [
            {"instruction": "Add.", "context": "2 and 3", "response": "5", "category": "closed_qa"},
            {"instruction": "Add.", "context": "", "response": "6", "category": "open_qa"},
        ],
        ADD_ROWS,
        "alpaca",
    ),
    "Alpaca": (
        [
            {"instruction": "Add.", "input": "2 and 3", "output": "5", "text": f"{ADD_THESE}5"},
            {"instruction": "Add.", "input": "", "output": "6", "text": f"{ADD}6"},
        ],
        ADD_ROWS,
        "alpaca",
    ),
    "WizardLM": ([{"instruction": "Add.", "output": "6"}], [ADD_ROWS[1]], "alpaca"),
    "ShareGPT": (
        [
            shared(("human", "hi"), ("gpt", "hello"), ("human", "next"), ("gpt", "bye")),
            shared(("gpt", "so"), ("human", "hi"), ("gpt", "ok")),
        ],
        [IN_VICUNA, [IN_VICUNA[0], (" ok</s>", True)]],
        "chat",
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_data_loads_without_code(
    name: str, letters: Any, vicuna: str, tmp_path: Path
) -> None:
    rows, wanted, template = PUBLISHED[name]
    data = of_client(tmp_path, f"{name}.json", rows, with_chat(letters, vicuna))
    assert (data.template, data.dropped) == (template, {})
    by_writing = [by_hand(letters, pieces) for pieces in wanted]
    assert in_any_order(data.clients[0].train) == in_any_order(by_writing)


def test_conversations_without_a_chat_template_are_refused_when_loaded(
    letters: Any, tmp_path: Path
) -> None:
    with pytest.raises(fedlora.InputError, match=r"chat_template_path.*vicuna"):
        of_client(tmp_path, "x.json", PUBLISHED["ShareGPT"][0], letters)
