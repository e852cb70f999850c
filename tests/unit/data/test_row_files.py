"""Files and data sets as rows, and what is said of those that cannot be read."""

from __future__ import annotations

import csv
import gzip
import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedlora import Config
from fedlora.data.datasets import find_labels, load_data, load_rows, template_of
from fedlora.data.row_files import ENDINGS, read_rows
from fedlora.errors import InputError
from fedlora.runs.session import tokenized
from support.rows import rows, write_jsonl

ROWS: list[dict[str, Any]] = [
    {"text": "plain", "number": 7, "share": 0.5, "yes": True},
    {"text": 'a "quoted", one\nof two lines', "number": 8, "share": 1.5, "yes": False},
    {"text": "grün 日本 \u2028 \U0001f600", "number": -1, "share": 0.0, "yes": True},
]


BOM = b"\xef\xbb\xbf"


def as_list(values: list[dict[str, Any]]) -> bytes:
    return json.dumps(values, ensure_ascii=False, indent=2).encode()


def as_lines(values: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(v, ensure_ascii=False) + "\n" for v in values).encode()


def write_parquet(path: Path, values: list[dict[str, Any]]) -> None:
    from datasets import Dataset

    Dataset.from_list(values).to_parquet(str(path))


def write_csv(path: Path, values: list[dict[str, Any]], encoding: str = "utf-8") -> None:
    with path.open("w", newline="", encoding=encoding) as out:
        writer = csv.DictWriter(out, list(values[0]))
        writer.writeheader()
        writer.writerows(values)


def refused(path: Path, content: bytes | str | None = None) -> str:
    """What is said of the file, without its directory."""
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(InputError) as raised:
        read_rows(path)
    message = str(raised.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message.removeprefix(f"{path.parent}/")


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".ndjson"])
@pytest.mark.parametrize("write", [as_list, as_lines], ids=["list", "lines"])
@pytest.mark.parametrize("mark", [b"", BOM], ids=["", "BOM"])
def test_json_is_read_whichever_form_it_has(
    ending: str, write: Callable[[list[dict[str, Any]]], bytes], mark: bytes, tmp_path: Path
) -> None:
    (tmp_path / f"x{ending}").write_bytes(mark + write(ROWS))
    assert read_rows(tmp_path / f"x{ending}") == ROWS


def test_json_of_one_row(tmp_path: Path) -> None:
    for name, content in (
        ("one.jsonl", '{"a": 1}'),
        ("two.jsonl", '\n\n{"a": 1}\n\n'),
        ("list.json", '\n [{"a": 1}]\n'),
    ):
        (tmp_path / name).write_text(content)
        assert read_rows(tmp_path / name) == [{"a": 1}]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_csv_gives_text(encoding: str, tmp_path: Path) -> None:
    write_csv(tmp_path / "x.csv", ROWS, encoding)
    assert read_rows(tmp_path / "x.csv") == [{k: str(v) for k, v in r.items()} for r in ROWS]


def test_cells_that_are_not_there_are_none(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("a,b,c\n1,,3\n4\n\n,,5\n")
    assert read_rows(tmp_path / "x.csv") == [
        {"a": "1", "b": None, "c": "3"},
        {"a": "4", "b": None, "c": None},
        {"a": None, "b": None, "c": "5"},
    ]


def test_parquet_keeps_types(tmp_path: Path) -> None:
    values = [{**row, "turns": [{"role": "user", "content": row["text"]}]} for row in ROWS]
    write_parquet(tmp_path / "x.parquet", values)
    assert read_rows(tmp_path / "x.parquet") == values


cells = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\0"), max_size=12)


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(values=st.lists(st.fixed_dictionaries({"a": cells, "b": cells}), min_size=1, max_size=5))
def test_any_text_survives_csv_and_json(values: list[dict[str, str]], tmp_path: Path) -> None:
    write_csv(tmp_path / "x.csv", values)
    wanted = [{k: v or None for k, v in row.items()} for row in values]
    assert read_rows(tmp_path / "x.csv") == wanted
    for name, content in (("x.jsonl", as_lines(values)), ("x.json", as_list(values))):
        (tmp_path / name).write_bytes(content)
        assert read_rows(tmp_path / name) == values


def test_a_csv_file_may_begin_with_a_bracket(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("[id],text\n1,a\n")
    assert read_rows(tmp_path / "x.csv") == [{"[id]": "1", "text": "a"}]


def test_a_long_cell_is_read(tmp_path: Path) -> None:
    """Documents are longer than Python's default limit of 131,072 characters a cell."""
    text = "word " * 40_000
    write_csv(tmp_path / "x.csv", [{"text": text}])
    assert read_rows(tmp_path / "x.csv") == [{"text": text}]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("x.json", '[{"a": 1},\n {"a": 2},\n {"a" 3}]', "line 3: malformed JSON: Expecting ':'"),
        ("x.json", '[{"a": 1},\n {"a": 2}', "line 2: malformed JSON: Expecting ','"),
        ("x.json", '[{"a": 1}]\n[{"a": 2}]\n', "line 2: malformed JSON: Extra data"),
        ("x.jsonl", '{"a": 1}\n\n{"a"}\n{"a": 3}\n', "line 3: malformed JSON: Expecting ':'"),
        ("x.jsonl", '{"a": 1}\n{"a": "cut off', "line 2: malformed JSON: Unterminated string"),
        ("x.jsonl", '{"a": 1} {"a": 2}\n', "line 1: malformed JSON: Extra data"),
        ("x.ndjson", '{"a": 1}\nnot JSON\n', "line 2: malformed JSON: Expecting value"),
        ("x.csv", "a,b\n1,2\n3,4,5\n", "line 3: row 2 has more cells than the header"),
        ("x.csv", "a,b\n\n\n1,2,3\n", "line 4: row 1 has more cells than the header"),
        ("x.csv", 'a,b\n"x\ny",2\n3,4,5\n', "line 4: row 2 has more cells than the header"),
        ("x.csv", "a,b,a\n1,2,3\n", "line 1: the header names the column 'a' twice"),
    ],
)
def test_the_malformed_line_is_named(name: str, content: str, says: str, tmp_path: Path) -> None:
    assert refused(tmp_path / name, content).startswith(f"{name}, {says}")


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('a,b\n1,2\n3,"4\n5,6\n', 3),
        ('a,b\n"1,2\n', 2),
        ('"a,b\n1,2\n', 1),
        ('a,b\n1,2\n3,4\n"x"y,6\n', 4),
        ('a,b\n\n1,"2\n', 3),
    ],
)
def test_the_line_of_a_stray_quote_is_named(content: str, line: int, tmp_path: Path) -> None:
    """Where the row begins: an open quote swallows all that follows."""
    assert refused(tmp_path / "x.csv", content).startswith(f"x.csv, line {line}: malformed CSV: ")


@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "x.csv"])
@pytest.mark.parametrize("before", [1, 2000], ids=["soon", "late"])
@pytest.mark.parametrize("mark", [b"", BOM], ids=["", "BOM"])
def test_the_line_that_is_no_utf8_is_named(
    name: str, before: int, mark: bytes, tmp_path: Path
) -> None:
    line = b"text,number\n" if name == "x.csv" else b'{"text": 1}\n'
    for stray in (b"\xff\n", b"gr\xfcn\n"):
        message = refused(tmp_path / name, mark + line * before + stray)
        assert message == f"{name}, line {before + 1}: is not UTF-8 text; convert the file"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("x.jsonl", "PARQUET", "is Parquet, not what its ending (.jsonl) says"),
        ("x.csv", "PARQUET", "is Parquet, not what its ending (.csv) says"),
        ("x.json", "GZIP", "is compressed (gzip), not what its ending (.json) says"),
        ("x.csv", "GZIP", "is compressed (gzip), not what its ending (.csv) says"),
        ("x.parquet", "GZIP", "is no Parquet file; it looks like compressed (gzip)"),
        ("x.jsonl", "ZIP", "is compressed (zip), not what its ending (.jsonl) says"),
        ("x.json", "BZh91AY", "is compressed (bzip2), not what its ending (.json) says"),
        ("x.csv", b"\x28\xb5\x2f\xfd\x04", "is compressed (zstd), not what its ending (.csv)"),
        ("x.csv", b"a,b\n1,\0\n", "is binary, not what its ending (.csv) says"),
        ("x.parquet", "a,b\n1,2\n", "is no Parquet file; it looks like text"),
        ("x.parquet", '{"a": 1}\n', "is no Parquet file; it looks like JSON"),
        ("x.parquet", b"\0\1\2", "is no Parquet file; it looks like binary"),
        ("x.csv", '{"a": 1}\n{"a": 2}\n', "holds JSON, not CSV; name it .json or .jsonl"),
        ("x.csv", '[{"a": 1},\n {"a": 2}]\n', "holds JSON, not CSV; name it .json or .jsonl"),
    ],
)
def test_what_is_not_what_its_ending_says(
    name: str, content: str | bytes, says: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    if content == "PARQUET":
        write_parquet(tmp_path / "made", ROWS)
        content = (tmp_path / "made").read_bytes()
    elif content == "GZIP":
        content = gzip.compress(b'{"a": 1}\n')
    elif content == "ZIP":
        with zipfile.ZipFile(tmp_path / "made", "w") as archive:
            archive.writestr("x.json", '{"a": 1}\n')
        content = (tmp_path / "made").read_bytes()
    assert refused(path, content).startswith(f"{name}: {says}")


def test_csv_in_a_json_file_is_told_its_ending(tmp_path: Path) -> None:
    for name in ("x.json", "x.jsonl"):
        message = refused(tmp_path / name, "prompt,completion\na,b\n")
        assert message == (
            f"{name}, line 1: malformed JSON: 'prompt,completion'; CSV files end in .csv"
        )


def test_a_cut_off_parquet_file(tmp_path: Path) -> None:
    write_parquet(tmp_path / "whole.parquet", ROWS)
    whole = (tmp_path / "whole.parquet").read_bytes()
    message = refused(tmp_path / "x.parquet", whole[:-20])
    assert message.startswith("x.parquet: cannot be read: Parquet magic bytes not found")
    assert refused(tmp_path / "x.parquet", b"").startswith("x.parquet: ")


@pytest.mark.parametrize("name", ["x.txt", "x", "x.csv.gz", "x.xlsx", "x.JSONX", ".json"])
def test_an_unknown_ending(name: str, tmp_path: Path) -> None:
    assert refused(tmp_path / name, "a,b\n1,2\n") == (
        f"{name}: cannot tell what it holds; its name should end in {', '.join(ENDINGS)}"
    )


def test_what_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "dir.json").mkdir()
    assert refused(tmp_path / "dir.json") == "dir.json: is no file"
    assert refused(tmp_path / "no.json") == "no.json: no such file"
    (tmp_path / "link.json").symlink_to(tmp_path / "nowhere.json")
    assert refused(tmp_path / "link.json") == "link.json: no such file"


def test_one_object_is_no_list_of_rows(tmp_path: Path) -> None:
    whole = {"version": 2, "data": [{"a": 1}], "b": 0, "c": 0, "d": 0, "e": 0}
    message = refused(tmp_path / "x.json", json.dumps(whole, indent=1))
    assert message == (
        "x.json: holds one JSON object with version, data, b, c, d; expected a list of rows, or "
        "one object per line"
    )


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.json", ""),
        ("x.json", BOM),
        ("x.json", "[]"),
        ("x.jsonl", "\n \n"),
        ("x.ndjson", " []\n"),
        ("x.csv", ""),
        ("x.csv", BOM),
        ("x.csv", "\n\n"),
        ("x.csv", "a,b\n"),
    ],
)
def test_a_file_without_rows(name: str, content: str | bytes, tmp_path: Path) -> None:
    assert refused(tmp_path / name, content) == f"{name}: holds no rows"


def test_a_parquet_file_without_rows(tmp_path: Path) -> None:
    from datasets import Dataset

    Dataset.from_dict({"a": []}).to_parquet(str(tmp_path / "x.parquet"))
    assert refused(tmp_path / "x.parquet") == "x.parquet: holds no rows"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("x.json", "[1, 2]", "row 1 is no object with columns: '1'"),
        ("x.json", '[{"a": 1}, "text"]', "row 2 is no object with columns: 'text'"),
        ("x.json", '[{"a": 1}, null]', "row 2 is no object with columns: 'None'"),
        ("x.jsonl", '{"a": 1}\n\n["b"]\n', "row 2 is no object with columns: \"['b']\""),
        ("x.json", '[["' + "x" * 100 + '"]]', "row 1 is no object with columns: \"['xxx"),
    ],
)
def test_rows_that_are_no_objects(name: str, content: str, says: str, tmp_path: Path) -> None:
    message = refused(tmp_path / name, content)
    assert message.startswith(f"{name}: {says}")
    assert len(message) < 100


@pytest.mark.parametrize("key", ["train_file", "eval_file"])
def test_the_key_of_the_file_is_named(key: str, site_files: Path, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"a"\n')
    values = {"train_file": str(site_files / "site_0.jsonl"), key: str(tmp_path / "x.jsonl")}
    with pytest.raises(InputError, match=rf"^{key}: .*x\.jsonl, line 1: malformed JSON: Expecting"):
        load_rows(Config(**values))
    with pytest.raises(InputError, match=rf"^{key}: .*x\.jsonl, line 1: malformed JSON: Expecting"):
        load_rows(Config(**{**values, key: str(tmp_path / "x.jsonl")}, num_clients=2))


def test_the_broken_file_of_a_pattern_is_named(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "s_1.jsonl", rows(3))
    (tmp_path / "s_2.jsonl").write_text("")
    with pytest.raises(InputError, match=r"^train_file: .*s_2\.jsonl: holds no rows$"):
        load_rows(Config(train_file=str(tmp_path / "s_*.jsonl")))


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_llama)


def run_of(tmp_path: Path, values: list[dict[str, Any]], **keys: Any) -> Config:
    path = write_jsonl(tmp_path / "train.jsonl", values)
    return Config(**{"train_file": str(path), "num_clients": 1, **keys})


def test_mixed_types_in_a_column_that_is_used(tokenizer: Any, tmp_path: Path) -> None:
    values = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": 4}]
    with pytest.raises(
        InputError,
        match=r"^the training data: the column completion mixes types: row 1 .*, row 2 a number",
    ):
        load_data(run_of(tmp_path, values), tokenizer)
    evaluation = write_jsonl(tmp_path / "e.jsonl", values)
    with pytest.raises(
        InputError, match=r"^the evaluation data: the column completion mixes types"
    ):
        load_data(run_of(tmp_path, values[:1], eval_file=str(evaluation)), tokenizer)


def test_mixed_types_in_a_column_that_is_not_used(tokenizer: Any, tmp_path: Path) -> None:
    values = [
        {"prompt": "a", "completion": "b", "id": 1},
        {"prompt": "a", "completion": "b", "id": "two"},
        {"prompt": "a", "completion": "b", "id": None, "more": []},
    ]
    config = run_of(tmp_path, values, eval_file=str(tmp_path / "train.jsonl"))
    data = load_data(config, tokenizer)
    assert (len(data.clients[0].train), len(data.eval)) == (3, 3)


def test_evaluation_data_that_lack_a_column(tokenizer: Any, tmp_path: Path) -> None:
    evaluation = write_jsonl(tmp_path / "e.jsonl", [{"prompt": "a", "answer": "b"}])
    config = run_of(tmp_path, rows(2), eval_file=str(evaluation))
    with pytest.raises(InputError) as raised:
        load_data(config, tokenizer)
    assert str(raised.value) == (
        "the evaluation data: template prompt_completion needs the column completion; it has "
        "prompt, answer"
    )


def test_rows_that_are_all_dropped(tokenizer: Any, tmp_path: Path) -> None:
    site = tmp_path / "sites"
    site.mkdir()
    write_jsonl(site / "s0.jsonl", rows(3))
    write_jsonl(site / "s1.jsonl", [{"prompt": "x" * 40, "completion": "y"}] * 3)
    config = Config(train_file=str(site / "s*.jsonl"), max_length=30)
    why = (
        "client 1 (s1.jsonl): all 3 rows are dropped: cut to max_length 30, it has no token left "
        "to learn from; use a larger one"
    )
    data = load_data(config, tokenizer)
    assert [len(part.train) for part in data.clients] == [3, 0]
    assert data.notes[0] == f"1 of 2 clients takes no part: {why}"
    with pytest.raises(InputError) as raised:
        load_data(Config(**{**config.flat(), "strict_clients": True}), tokenizer)
    assert (
        str(raised.value) == f"{why}. Mend them, or leave strict_clients out to go on without them"
    )
    # All in one warning, and an error when nobody is left.
    write_jsonl(site / "s2.jsonl", [{"prompt": "x" * 40, "completion": "y"}])
    note = load_data(config, tokenizer).notes[0]
    assert note.startswith("2 of 3 clients take no part: client 1 (s1.jsonl): all 3 rows are")
    assert "; client 2 (s2.jsonl): all 1 rows are dropped" in note
    (site / "s0.jsonl").unlink()
    with pytest.raises(
        InputError, match=r"^client 0 \(s1.jsonl\): all 3 .*; client 1 \(s2.jsonl\)"
    ):
        load_data(config, tokenizer)
    write_jsonl(site / "s0.jsonl", rows(3))
    good = {**config.flat(), "train_file": str(site / "s0.jsonl"), "num_clients": 1}
    with pytest.raises(InputError, match=r"^the evaluation data: all 3 rows are dropped: cut to"):
        load_data(Config(**{**good, "eval_file": str(site / "s1.jsonl")}), tokenizer)


def test_a_file_whose_rows_all_lack_a_column_is_a_client_left_out(
    tokenizer: Any, tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "s0.jsonl", rows(3))
    write_jsonl(tmp_path / "s1.jsonl", [{"prompt": None, "completion": "y"}] * 2)
    config = Config(train_file=str(tmp_path / "s*.jsonl"))
    data = load_data(config, tokenizer)
    why = "client 1 (s1.jsonl): all 2 rows are dropped: it has no prompt"
    assert [len(part.train) for part in data.clients] == [3, 0]
    assert data.notes[0] == f"1 of 2 clients takes no part: {why}"
    with pytest.raises(InputError, match=re.escape(why) + r"\. Mend them"):
        load_data(Config(**{**config.flat(), "strict_clients": True}), tokenizer)
    # One row among others is a mistake in the file.
    write_jsonl(tmp_path / "s1.jsonl", [*rows(2), {"prompt": None, "completion": "y"}])
    with pytest.raises(InputError, match=r"s1.jsonl, row 3 has no prompt"):
        load_data(config, tokenizer)


def test_a_classifier_goes_on_without_a_file_that_has_no_labels(
    tokenizer: Any, tmp_path: Path
) -> None:
    labelled = [{"text": f"row {i}", "label": "ab"[i % 2]} for i in range(4)]
    write_jsonl(tmp_path / "s0.jsonl", labelled)
    write_jsonl(tmp_path / "s1.jsonl", [{**row, "label": None} for row in labelled])
    config = Config(train_file=str(tmp_path / "s*.jsonl"), label_column_name="label")
    data = load_data(config, tokenizer)
    assert [len(part.train) for part in data.clients] == [4, 0]
    assert data.label_names == ("a", "b")


def test_rows_that_are_dropped_for_several_reasons(tokenizer: Any, tmp_path: Path) -> None:
    texts = ["", *["x"] * 3]
    config = run_of(tmp_path, [{"text": text} for text in texts], max_length=2)
    assert load_data(config, tokenizer).dropped == {"no token to learn from": 1}
    values = [
        {"messages": [{"role": "user", "content": "a"}]},
        {"conversations": [{"from": "alien", "value": "a"}]},
        {"conversations": [{"from": "alien", "value": "b"}]},
    ]
    with pytest.raises(
        InputError,
        match=r"^client 0: all 3 rows are dropped, 2 of them because: unknown speaker 'alien'$",
    ):
        load_data(run_of(tmp_path, values), tokenizer)


def label_problem(tmp_path: Path, values: list[dict[str, Any]], **keys: Any) -> str:
    config = run_of(tmp_path, values, label_column_name="label", **keys)
    raw = load_rows(config)
    with pytest.raises(InputError) as raised:
        find_labels(raw, template_of(config, raw, True), config.label_names)
    return str(raised.value)


def labelled(labels: list[Any]) -> list[dict[str, Any]]:
    return [{"text": f"row {i}", "label": label} for i, label in enumerate(labels)]


def test_what_are_no_classes(tmp_path: Path) -> None:
    assert label_problem(tmp_path, labelled(["a"] * 7)) == (
        "label_column_name: label has one value (a) in all 7 training rows; a classifier needs two"
    )
    assert label_problem(tmp_path, labelled([0.5, 1.5])) == (
        "label_column_name: label holds 0.5; expected text or whole numbers"
    )
    assert label_problem(tmp_path, labelled([["a"], ["b"]])) == (
        "label_column_name: label holds ['a']; expected text or whole numbers"
    )
    assert label_problem(tmp_path, labelled([f"name {i}" for i in range(300)])) == (
        "label_column_name: label has 300 different values in 300 rows; these are no classes"
    )
    assert label_problem(tmp_path, labelled(["a", "b", "c"]), label_names=["b", "a"]) == (
        "label_names: the data has labels that are not among them: c"
    )
    assert label_problem(tmp_path, labelled(["a", 1])).startswith(
        "the training data: the column label mixes types: row 1 holds text ('a'), row 2 a number"
    )
    assert label_problem(tmp_path, labelled(["a", None])).startswith(
        "the training data: row 2 has no label: {'text': 'row 1'"
    )


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["b", "a", "b"], ["a", "b"]),
        ([10, 9, 1, 1], ["1", "9", "10"]),
        ([True, False], ["False", "True"]),
        ([i % 150 for i in range(450)], [str(i) for i in range(150)]),
    ],
    ids=["text", "numbers", "truth", "many"],
)
def test_labels_in_natural_order(labels: list[Any], names: list[str], tmp_path: Path) -> None:
    config = run_of(tmp_path, labelled(labels), label_column_name="label")
    raw = load_rows(config)
    assert find_labels(raw, template_of(config, raw, True), config.label_names) == names


def test_what_is_read_is_what_is_trained_on(tiny_llama: Path, tmp_path: Path) -> None:
    """The same rows as JSON lines, a JSON list, CSV and Parquet give the same tokens."""
    values = [{"prompt": r["prompt"], "completion": r["completion"]} for r in rows(6)]
    write_jsonl(tmp_path / "x.jsonl", values)
    (tmp_path / "x.json").write_bytes(as_list(values))
    write_csv(tmp_path / "x.csv", values)
    write_parquet(tmp_path / "x.parquet", values)
    keys = {"model_name_or_path": str(tiny_llama), "num_clients": 2, "max_steps": 1}
    found = set()
    for ending in ("jsonl", "json", "csv", "parquet"):
        config = Config(**keys, train_file=str(tmp_path / f"x.{ending}"))
        found.add(tokenized(config)[2].fingerprint)
    assert len(found) == 1
