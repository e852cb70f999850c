"""No data and no chat template ends in a traceback: used, dropped with a reason, or refused."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from fedlora import Config, InputError
from fedlora.data.chat_messages import UnusableRowError
from fedlora.data.datasets import load_data
from fedlora.data.json_text import loads
from fedlora.data.templates import TEMPLATES
from fedlora.data.tokenize import tokenize
from support.tokens import CHATML, MARKED_CHATML, byte_level, of_model, with_chat

FUZZ = settings(
    max_examples=25,
    deadline=None,
    phases=[Phase.generate],  # to make a failure smaller takes minutes
    database=None,
    suppress_health_check=list(HealthCheck),
)


NUMBERS = (
    st.integers(-5, 5)
    | st.sampled_from([10**400, -(2**63) - 1, 1e308, -0.0, math.nan, math.inf, -math.inf])
    | st.floats()
)


TEXTS = st.text(max_size=8) | st.sampled_from(
    ["", " ", "nan", "NaN", "\ud800", "\x00", "\ufeff", "</s>", "<|im_end|>", "{a}", "[1,", "{}",
     "[]", "[[1]]", "null", "\ue000\uf8ff0\ue001", "\u2028", "x" * 300]
)  # fmt: skip


SCALARS = st.none() | st.booleans() | NUMBERS | TEXTS


VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(TEXTS | st.sampled_from(["a", "name", "type"]), inner, max_size=3)
    ),
    max_leaves=6,
)


def mostly(usual: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """What stands there usually, and sometimes anything."""
    return st.integers(0, 49).flatmap(lambda i: VALUES if i == 7 else usual)


CALLS = st.lists(
    mostly(
        st.fixed_dictionaries(
            {},
            optional={
                "id": VALUES,
                "type": st.just("function"),
                "name": TEXTS,
                "function": mostly(
                    st.fixed_dictionaries(
                        {"name": TEXTS}, optional={"arguments": VALUES | st.just('{"a": 1}')}
                    )
                ),
            },
        )
    ),
    max_size=2,
)


ROLES = ["user", "assistant", "system", "tool", "human", "gpt", "observation", "function_call"]


TURNS = st.lists(
    mostly(
        st.fixed_dictionaries(
            {"role": mostly(st.sampled_from(ROLES)), "content": mostly(TEXTS)},
            optional={
                "tool_calls": mostly(CALLS),
                "function_call": VALUES,
                "weight": mostly(st.sampled_from([0, 1, 0.0, True, "0"])),
                "train": mostly(st.booleans()),
                "name": VALUES,
                "reasoning_content": VALUES,
            },
        )
        | st.fixed_dictionaries(
            {"from": mostly(st.sampled_from(ROLES)), "value": mostly(TEXTS)},
            optional={"weight": st.sampled_from([0, 1])},
        )
    ),
    max_size=4,
)


PAIRS = st.lists(st.lists(TEXTS, min_size=2, max_size=2), max_size=2)


TOOLS = st.lists(mostly(st.fixed_dictionaries({"type": TEXTS, "function": VALUES})), max_size=2)


COLUMNS: dict[str, st.SearchStrategy[Any]] = {
    "instruction": mostly(TEXTS),
    "input": mostly(TEXTS),
    "output": mostly(TEXTS),
    "system": mostly(TEXTS),
    "history": mostly(PAIRS),
    "messages": mostly(TURNS),
    "conversations": mostly(TURNS),
    "prompt": mostly(TEXTS | TURNS),
    "completion": mostly(TEXTS | TURNS),
    "text": mostly(TEXTS),
    "label": mostly(st.sampled_from(["a", "b", 0, 1])),
    "tools": mostly(TOOLS | TOOLS.map(lambda tools: json.dumps(tools))),
    "chat_template_kwargs": mostly(st.dictionaries(TEXTS, VALUES, max_size=2)),
}


@st.composite
def tables(draw: st.DrawFn) -> list[dict[Any, Any]]:
    """Rows that have columns in common, most of them."""
    kinds = [
        ["instruction", "input", "output", "system", "history"],
        ["messages", "system", "tools", "chat_template_kwargs"],
        ["conversations", "system", "tools"],
        ["prompt", "completion", "tools"],
        ["text", "label"],
        list(COLUMNS),
    ]
    columns = draw(st.sampled_from(kinds))
    row = st.fixed_dictionaries({name: COLUMNS[name] for name in columns})
    rows = draw(st.lists(row, min_size=1, max_size=4))
    if draw(st.integers(0, 4)) == 4:
        for odd in rows[1:]:
            odd.pop(draw(st.sampled_from(columns)), None)
            odd[draw(TEXTS)] = draw(VALUES)
    return rows


def settings_of(draw: st.DrawFn) -> dict[str, Any]:
    """A configuration that reads such rows."""
    return draw(
        st.sampled_from(
            [
                {},
                {"template": "text"},
                {"template": "alpaca"},
                {"template": "chat"},
                {"template": "prompt_completion", "completion_only_loss": False},
                {"label_column_name": "label", "text_column_names": ["text"]},
                {"label_column_name": "label", "partition": "dirichlet"},
                {"prompt_template": "{prompt}", "completion_template": "{completion}"},
                {"partition": "column", "partition_column": "label", "num_clients": None},
                {"max_length": 3, "max_train_samples": 1, "client_eval_fraction": 0.4},
                {"strict_clients": True, "eval_fraction": 0.3},
            ]
        )
    )


def as_json(rows: list[dict[Any, Any]], lines: bool) -> str:
    if lines:
        return "\n".join(json.dumps(row) for row in rows)
    return json.dumps(rows)


def as_csv(rows: list[dict[Any, Any]]) -> str:
    out = io.StringIO()
    columns = list(dict.fromkeys(str(name) for row in rows for name in row))
    writer = csv.writer(out)
    writer.writerow(columns)
    for row in rows:
        cells = [row.get(name) for name in columns]
        writer.writerow(["" if cell is None else str(cell)[:500] for cell in cells])
    return out.getvalue()


def as_parquet(rows: list[dict[Any, Any]]) -> bytes:
    import pyarrow as pa
    from pyarrow import parquet

    columns = list(dict.fromkeys(str(name) for row in rows for name in row))
    arrays = []
    for name in columns:
        try:
            array = pa.array([row.get(name) for row in rows])
            parquet.write_table(pa.table({"x": array}), io.BytesIO())
            arrays.append(array)
        except (pa.ArrowException, OverflowError, UnicodeError, TypeError, ValueError):
            arrays.append(
                pa.array([str(row.get(name))[:50].encode("utf-8", "replace") for row in rows])
            )
    out = io.BytesIO()
    encoded = [name.encode("utf-8", "replace").decode() for name in columns]
    parquet.write_table(pa.Table.from_arrays(arrays, encoded), out)
    return out.getvalue()


@st.composite
def files(draw: st.DrawFn) -> tuple[str, bytes]:
    """A name's ending and what stands in the file: rows, whole or damaged, or anything."""
    kind = draw(st.sampled_from(["json", "jsonl", "json", "jsonl", "csv", "parquet", "bytes"]))
    rows = draw(tables())
    encoding = draw(st.sampled_from(["utf-8"] * 12 + ["utf-8-sig", "utf-16", "latin-1", "cp1252"]))
    ending = draw(st.sampled_from([kind] * 16 + ["json", "csv", "parquet", "ndjson", "txt"]))
    if kind == "bytes":
        content = draw(st.binary(max_size=60))
        ending = draw(st.sampled_from(["json", "jsonl", "csv", "parquet"]))
    elif kind == "parquet":
        content = as_parquet(rows)
    else:
        text = as_csv(rows) if kind == "csv" else as_json(rows, kind == "jsonl")
        content = text.encode(encoding, "replace")
    if draw(st.integers(0, 19)) == 7:
        cut = draw(st.integers(0, len(content)))
        content = content[:cut] + draw(st.binary(max_size=3)) + content[cut + 1 :]
    return ending, content


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, bytes, dict[str, Any]]:
    return *draw(files()), settings_of(draw)


@pytest.fixture(scope="module")
def tokenizers() -> list[Any]:
    """Without markers, with them, by tools, and one of a model that thinks."""
    plain = byte_level(["<|im_start|>", "<|im_end|>"], trained=False)
    plain.pad_token = plain.eos_token
    shipped = [of_model(name) for name in ("qwen3", "llama3_1", "gptoss")]
    return [with_chat(plain, CHATML), with_chat(plain, MARKED_CHATML), *shipped]


def refused_in_words(error: Exception) -> None:
    """What a user reads is one line that says something."""
    message = str(error)
    assert message.strip()
    assert "\n" not in message.strip()
    assert "Traceback" not in message


@seed(12)
@FUZZ
@given(cases(), st.integers(0, 4))
def test_no_file_ends_in_a_traceback(
    tokenizers: list[Any], tmp_path_factory: pytest.TempPathFactory,
    case: tuple[str, bytes, dict[str, Any]], which: int,
) -> None:  # fmt: skip
    ending, content, values = case
    path = tmp_path_factory.getbasetemp() / f"rows.{ending}"
    path.write_bytes(content)
    try:
        config = Config(**{"train_file": str(path), "num_clients": 1, **values})
        data = load_data(config, tokenizers[which])
    except InputError as error:
        refused_in_words(error)
        return
    for row in (row for part in data.clients for row in part.train):
        assert len(row["input_ids"]) <= config.max_length
    assert any(part.train for part in data.clients)


@seed(13)
@FUZZ
@given(tables(), st.sampled_from(sorted(TEMPLATES)), st.booleans(), st.integers(0, 4))
def test_no_row_ends_in_a_traceback(
    tokenizers: list[Any], rows: list[dict[Any, Any]], name: str, only: bool, which: int
) -> None:
    template = TEMPLATES[name]
    for row in map(loads, map(json.dumps, rows)):  # as from a file
        if template.missing(list(row)) or any(
            all(row.get(column) is None for column in columns) for columns in template.columns
        ):
            continue  # refused before
        try:
            found = tokenize(row, template, tokenizers[which], 500, only)
        except (InputError, UnusableRowError) as error:
            refused_in_words(error)
            continue
        assert len(found["input_ids"]) == len(found["labels"])
        assert max(found["labels"][1:]) >= 0


PIECES = [
    "{% for m in messages %}", "{% endfor %}", "{{ m.content }}", "{{ m['role'] }}", "{{ m }}",
    "<|im_start|>", "<|im_end|>\n", "{% if m.role == 'user' %}", "{% else %}", "{% endif %}",
    "{% if loop.last %}", "{{ raise_exception('no') }}", "{{ 1 / 0 }}", "{{ nothing.at.all }}",
    "{% generation %}", "{% endgeneration %}", "{{ eos_token }}", "{{ messages[-1].content }}",
    "{% set messages = messages[1:] %}", "{% set x = m %}", "{{ x.content | tojson }}",
    "{% for i in range(messages|length) %}", "{{ messages[i].content }}", "{% continue %}",
    "{% break %}", "{% macro f(a) %}", "{% endmacro %}", "{{ f(m) }}", "{{ f(messages) }}",
    "{% for i in range(10**12) %}", "{{ m.content | length + m }}", "{{ m.missing.deeper }}",
    "{% if add_generation_prompt %}assistant: {% endif %}", "{{ tools | tojson }}", "{%", "}}",
    "{% set ns = namespace(t='') %}", "{% set ns.t = ns.t + m.content %}", "{{ ns.t }}", "\ue000",
    "{{ strftime_now('%Y') }}", "{{ m.tool_calls[0].function.arguments | items }}",
    "{{ m.content.__class__.__mro__ }}", "{{ m.update({'a': 1}) }}", "{{ m.content * 10 }}",
    "{% for m in messages recursive %}", "{{ loop(messages) }}", "{{ m.content | trim }}",
    "{% filter upper %}", "{% endfilter %}", "{% set t %}", "{% endset %}", "{{ t }}", "\n", " ",
]  # fmt: skip


LOOP = "{% for m in messages %}<|im_start|>{{ m.role }}\n"


ANY_TEMPLATE = (
    st.lists(st.sampled_from(PIECES), max_size=7).map("".join)
    | st.lists(st.sampled_from(PIECES), max_size=4).map(
        lambda pieces: LOOP + "".join(pieces) + "{{ m.content }}<|im_end|>\n{% endfor %}"
    )
    | st.text(max_size=12)
)


@seed(14)
@settings(FUZZ, max_examples=60)
@given(ANY_TEMPLATE, TURNS, st.booleans(), st.booleans())
def test_no_chat_template_ends_in_a_traceback(
    tokenizers: list[Any], template: str, turns: list[Any], usual: bool, only: bool
) -> None:
    if usual:
        turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}] * 2
        turns[1] = {**turns[1], "weight": 0}
    tokenizer = with_chat(tokenizers[0], template)
    try:
        found = tokenize({"messages": turns}, TEMPLATES["chat"], tokenizer, 5000, only)
    except (InputError, UnusableRowError) as error:
        refused_in_words(error)
        return
    assert len(found["input_ids"]) == len(found["labels"])


def test_the_cases_are_not_all_refused(tokenizers: list[Any], tmp_path: Path) -> None:
    """So that the tests above try what lies behind the first check, too."""
    used: list[bool] = []

    @seed(12)
    @settings(FUZZ, max_examples=30)
    @given(cases())
    def count(case: tuple[str, bytes, dict[str, Any]]) -> None:
        path = tmp_path / f"rows.{case[0]}"
        path.write_bytes(case[1])
        try:
            config = Config(**{"train_file": str(path), "num_clients": 1, **case[2]})
            load_data(config, tokenizers[0])
            used.append(True)
        except InputError:
            used.append(False)

    count()
    assert sum(used) > 3
