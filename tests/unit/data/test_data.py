"""Rows, templates, tokens: what is learnt from, written out by hand."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedlora
from fedlora import Config
from fedlora.data.datasets import FederatedData, load_data
from fedlora.data.hub import read_hub
from fedlora.data.raw_data import RawData
from fedlora.data.raw_data import load_rows as load_raw
from fedlora.data.row_files import read_rows
from fedlora.data.templates import TEMPLATES, UnusableRowError, choose_template
from fedlora.data.tokenize import IGNORE, tokenize
from support.rows import rows, write_jsonl

SEPARATORS = "a\u2028b\u2029c\x85d\x0be\x1cf"
"""What str.splitlines takes for ends of lines, and JSON does not."""


TABLE: list[dict[str, Any]] = [
    {"prompt": "eins", "completion": "1", "number": 1},
    {"prompt": 'zwei, "2"', "completion": "zwei\nZeilen", "number": 2},
    {"prompt": "drei", "completion": "drei", "number": 3},
]


@pytest.fixture(scope="session")
def tokenizer(tiny_llama: Path) -> Any:
    """A token per character."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_llama)


def load_rows(config: Config) -> tuple[list[list[dict[str, Any]]], list[dict[str, Any]]]:
    """Every client's rows, and those of the evaluation."""
    found: RawData = load_raw(config)
    return found.clients, found.eval


def write_parquet(path: Path, values: list[dict[str, Any]]) -> None:
    """Rows as a Parquet file."""
    from datasets import Dataset

    Dataset.from_list(values).to_parquet(str(path))


def write_csv(path: Path, values: list[dict[str, Any]]) -> None:
    """Rows as CSV, by the standard library."""
    with path.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, list(values[0]))
        writer.writeheader()
        writer.writerows(values)


def write_json(path: Path, values: list[dict[str, Any]]) -> None:
    """Rows as one JSON list."""
    path.write_text("\n " + json.dumps(values, indent=1))


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("x.json", write_json),
        ("x.jsonl", write_jsonl),
        ("x.json", write_jsonl),  # some call lines of JSON .json too
        ("x.csv", write_csv),
        ("x.parquet", write_parquet),
    ],
)
def test_every_kind_of_file_gives_the_same_rows(
    name: str, write: Callable[[Path, list[dict[str, Any]]], Any], tmp_path: Path
) -> None:
    write(tmp_path / name, TABLE)
    wanted = TABLE
    if name == "x.csv":  # which knows no types
        wanted = [{key: str(value) for key, value in row.items()} for row in TABLE]
    assert read_rows(tmp_path / name) == wanted
    assert read_rows(str(tmp_path / name)) == wanted


def test_cells_of_a_csv_file_are_text(tmp_path: Path) -> None:
    """Numbers keep their zeros, and words that look like a missing value stay words."""
    answers = ["007", "1.50", "None", "NA", "null", "true"]
    write_csv(tmp_path / "x.csv", [{"prompt": "p", "completion": text} for text in answers])
    assert [row["completion"] for row in read_rows(tmp_path / "x.csv")] == answers
    (tmp_path / "x.csv").write_bytes(b"\xef\xbb\xbfprompt,completion\r\na,\r\nb,007\r\n")
    assert read_rows(tmp_path / "x.csv") == [
        {"prompt": "a", "completion": None},
        {"prompt": "b", "completion": "007"},
    ]


def test_a_csv_row_longer_than_its_header_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("prompt,completion\na,b\na,b,c\n")
    with pytest.raises(fedlora.InputError, match="row 2 has more cells than the header"):
        read_rows(tmp_path / "x.csv")


@pytest.mark.parametrize("ascii_only", [True, False])
def test_line_separators_inside_strings_end_no_line(tmp_path: Path, ascii_only: bool) -> None:
    """U+2028 and the like are plain characters to JSON, and end a line for str.splitlines."""
    wanted = [{"text": SEPARATORS}, {"text": "second"}]
    path = tmp_path / "x.jsonl"
    lines = [json.dumps(row, ensure_ascii=ascii_only) for row in wanted]
    path.write_text("\n\n".join(lines) + "\n \n", encoding="utf-8")
    assert read_rows(path) == wanted


def test_windows_line_ends(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "a"}\r\n{"text": "b"}\r\n')
    assert read_rows(tmp_path / "x.jsonl") == [{"text": "a"}, {"text": "b"}]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(fedlora.InputError, match=r"nothing\.jsonl: no such file"):
        read_rows(tmp_path / "nothing.jsonl")


def test_a_malformed_line_is_named_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a\u2028b"}\n\n{"text": "b"\n{"text": "c"}\n')
    with pytest.raises(fedlora.InputError, match=r"x\.jsonl, line 3: malformed JSON"):
        read_rows(path)
    path.write_text('[{"text": "a"},\n {"text": "b"},\n {"text" "c"}]')
    with pytest.raises(fedlora.InputError, match=r"x\.jsonl, line 3: malformed JSON"):
        read_rows(path)


@pytest.mark.parametrize("content", ["", "\n \n", "[]"])
def test_a_file_without_rows_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(fedlora.InputError, match=r"x\.jsonl: holds no rows"):
        read_rows(tmp_path / "x.jsonl")


def test_rows_that_are_no_objects_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n["b"]\n')
    with pytest.raises(fedlora.InputError, match="row 2 is no object with columns"):
        read_rows(tmp_path / "x.jsonl")


@pytest.mark.parametrize("name", ["x.parquet", "x.jsonl", "x.csv"])
def test_what_is_no_such_file_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\xff\xfe\x00PAR")
    with pytest.raises(fedlora.InputError, match=rf"{name}: is (no Parquet file|binary|UTF-16)"):
        read_rows(tmp_path / name)


def test_files_of_a_pattern_come_in_natural_order(tmp_path: Path) -> None:
    for i in (0, 1, 2, 9, 10, 11):
        write_jsonl(tmp_path / f"site{i}.jsonl", [{"text": f"of {i}"}])
    parts, _ = load_rows(Config(train_file=str(tmp_path / "site*.jsonl")))
    assert [part[0]["text"] for part in parts] == [f"of {i}" for i in (0, 1, 2, 9, 10, 11)]


def test_a_file_whose_name_looks_like_a_pattern(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "part[1].jsonl", rows(4))
    parts, _ = load_rows(Config(train_file=str(tmp_path / "part[1].jsonl"), num_clients=2))
    assert sum(len(part) for part in parts) == 4


def test_a_pattern_without_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(fedlora.InputError, match=r"train_file: .* the pattern matches no file"):
        load_rows(Config(train_file=str(tmp_path / "*.jsonl")))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"num_clients": 3}, "num_clients: 3, but train_file: .* matches 4 files"),
        ({"client_ranks": [1, 2]}, "client_ranks: 2, but train_file: .* matches 4 files"),
    ],
)
def test_counts_that_do_not_fit_the_files(
    values: dict[str, Any], says: str, site_files: Path
) -> None:
    with pytest.raises(fedlora.InputError, match=says):
        load_rows(Config(**{"train_file": str(site_files / "site_*.jsonl"), **values}))


def test_counts_that_do_not_fit_each_other(site_files: Path) -> None:
    values = {"train_file": str(site_files / "site_0.jsonl"), "client_ranks": [1, 2]}
    with pytest.raises(
        fedlora.InputError, match="num_clients: 3, client_ranks: 2: these do not name the same"
    ):
        load_rows(Config(**{**values, "num_clients": 3}))
    assert len(load_rows(Config(**values))[0]) == 2


def test_no_data_at_all_says_which_keys_to_give() -> None:
    with pytest.raises(fedlora.InputError, match="no data: give train_file or dataset_name"):
        load_rows(Config())


def test_one_file_is_divided_without_loss(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "x.jsonl", [{"text": str(i)} for i in range(23)])
    config = Config(train_file=str(tmp_path / "x.jsonl"), num_clients=5)
    parts, _ = load_rows(config)
    assert [len(part) for part in parts] == [5, 5, 5, 4, 4]
    assert sorted(int(row["text"]) for part in parts for row in part) == list(range(23))
    assert load_rows(config)[0] == parts
    assert load_rows(config.model_copy(update={"seed": 1}))[0] != parts


def test_more_clients_than_rows_is_refused(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "x.jsonl", [{"text": str(i)} for i in range(3)])
    with pytest.raises(fedlora.InputError, match="num_clients: 4 clients for 3 rows"):
        load_rows(Config(train_file=str(tmp_path / "x.jsonl"), num_clients=4))


def shares(tmp_path: Path, alpha: float, seed: int = 42) -> np.ndarray[Any, Any]:
    """Rows of each of 3 labels at each of 4 clients, divided by Dirichlet."""
    write_jsonl(tmp_path / "x.jsonl", [{"text": str(i), "kind": "abc"[i % 3]} for i in range(300)])
    config = Config(
        train_file=str(tmp_path / "x.jsonl"),
        num_clients=4,
        partition="dirichlet",
        partition_alpha=alpha,
        partition_column="kind",
        seed=seed,
    )
    parts, _ = load_rows(config)
    assert sorted(int(row["text"]) for part in parts for row in part) == list(range(300))
    return np.array([[sum(r["kind"] == k for r in part) for k in "abc"] for part in parts])


def test_dirichlet_divides_by_the_column(tmp_path: Path) -> None:
    even, skewed = shares(tmp_path, 1e4), shares(tmp_path, 0.1)
    assert even.sum(0).tolist() == skewed.sum(0).tolist() == [100, 100, 100]
    assert np.abs(even - 25).max() <= 3
    assert (skewed.max(0) > 60).any()
    assert skewed.sum(1).min() >= 1
    assert (shares(tmp_path, 0.1) == skewed).all()
    assert (shares(tmp_path, 0.1, seed=7) != skewed).any()


def test_dirichlet_needs_its_column(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "x.jsonl", rows(8))
    config = Config(
        train_file=str(tmp_path / "x.jsonl"), partition="dirichlet", partition_column="label"
    )
    with pytest.raises(
        fedlora.InputError, match="'label' is not a column; there are prompt, completion, kind"
    ):
        load_rows(config)


def test_a_directory_is_loaded_through_datasets(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", rows(6))
    write_jsonl(tmp_path / "test.jsonl", rows(3, 50))
    config = Config(dataset_name=str(tmp_path), dataset_test_split="test", num_clients=2)
    parts, evaluation = load_rows(config)
    assert sorted(str(row) for part in parts for row in part) == sorted(map(str, rows(6)))
    assert evaluation == rows(3, 50)
    missing = config.model_copy(update={"dataset_train_split": "training"})
    with pytest.raises(fedlora.InputError, match=r"dataset_name: .*'training' cannot be loaded"):
        load_rows(missing)


WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n"
    "\n"
    "### Instruction:\n"
    "Add the numbers.\n"
    "\n"
    "### Input:\n"
    "2 and 3\n"
    "\n"
    "### Response:\n"
)


WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n"
    "\n"
    "### Instruction:\n"
    "Add the numbers.\n"
    "\n"
    "### Response:\n"
)


@pytest.mark.parametrize(("given", "answer"), [("input", "output"), ("context", "response")])
def test_alpaca_written_out(given: str, answer: str) -> None:
    row = {"instruction": "Add the numbers.", given: "2 and 3", answer: "5"}
    assert choose_template("auto", list(row)).name == "alpaca"
    assert TEMPLATES["alpaca"].render(row) == (WITH_INPUT, "5")
    for nothing in ("", "  ", None):
        assert TEMPLATES["alpaca"].render({**row, given: nothing}) == (WITHOUT_INPUT, "5")
    del row[given]
    assert TEMPLATES["alpaca"].render(row) == (WITHOUT_INPUT, "5")


def test_the_template_is_chosen_by_the_columns() -> None:
    assert choose_template("auto", ["instruction", "response", "text"]).name == "alpaca"
    assert choose_template("auto", ["prompt", "completion", "text"]).name == "prompt_completion"
    assert choose_template("auto", ["text", "prompt"]).name == "text"
    assert choose_template("text", ["prompt", "completion", "text"]).name == "text"


def test_a_template_that_lacks_a_column_says_which() -> None:
    with pytest.raises(
        fedlora.InputError,
        match="alpaca needs the column output or response; the data has instruction, answer",
    ):
        choose_template("alpaca", ["instruction", "answer"])


def test_no_template_fits_lists_all() -> None:
    with pytest.raises(fedlora.InputError, match="no template fits the columns a, b") as found:
        choose_template("auto", ["a", "b"])
    for template in TEMPLATES.values():
        assert template.name in str(found.value)
    assert "output or response" in str(found.value)


def letters(tokenizer: Any, text: str) -> list[int]:
    """A token per character, looked up one by one."""
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[letter] for letter in text]


def test_labels_token_by_token(tokenizer: Any) -> None:
    row, template = {"prompt": "ab>", "completion": "ba"}, TEMPLATES["prompt_completion"]
    a, b, arrow, end = *letters(tokenizer, "ab>"), tokenizer.eos_token_id
    assert tokenize(row, template, tokenizer, 100, True) == {
        "input_ids": [a, b, arrow, b, a, end],
        "labels": [IGNORE, IGNORE, IGNORE, b, a, end],
    }
    assert tokenize(row, template, tokenizer, 100, False) == {
        "input_ids": [a, b, arrow, b, a, end],
        "labels": [a, b, arrow, b, a, end],
    }
    # Cut in the completion, and just after its first token.
    assert tokenize(row, template, tokenizer, 5, True) == {
        "input_ids": [a, b, arrow, b, a],
        "labels": [IGNORE, IGNORE, IGNORE, b, a],
    }
    assert tokenize(row, template, tokenizer, 4, True) == {
        "input_ids": [a, b, arrow, b],
        "labels": [IGNORE, IGNORE, IGNORE, b],
    }
    with pytest.raises(UnusableRowError, match="no token"):
        tokenize(row, template, tokenizer, 3, True)
    assert tokenize(row, template, tokenizer, 2, False) == {"input_ids": [a, b], "labels": [a, b]}


def test_plain_text_has_no_prompt(tokenizer: Any) -> None:
    a, b, end = *letters(tokenizer, "ab"), tokenizer.eos_token_id
    text = TEMPLATES["text"]
    assert tokenize({"text": "ab"}, text, tokenizer, 100, True) == {
        "input_ids": [a, b, end],
        "labels": [a, b, end],
    }
    # A single token is predicted from nothing: there is nothing to learn.
    with pytest.raises(UnusableRowError, match="no token"):
        tokenize({"text": ""}, text, tokenizer, 100, True)
    with pytest.raises(UnusableRowError, match="no token"):
        tokenize({"text": "ab"}, text, tokenizer, 1, True)


def test_a_text_that_ends_with_the_end_gets_no_second(tokenizer: Any) -> None:
    row = {"prompt": "a", "completion": "b</s>"}
    a, b, end = *letters(tokenizer, "ab"), tokenizer.eos_token_id
    found = tokenize(row, TEMPLATES["prompt_completion"], tokenizer, 100, True)
    assert found == {"input_ids": [a, b, end], "labels": [IGNORE, b, end]}


class EndsEveryText:
    """A tokenizer that begins and ends every text with special tokens, as T5's and others do."""

    eos_token_id = 2

    def __call__(self, text: str) -> dict[str, list[int]]:
        """Codes of the characters between the beginning and the end."""
        return {"input_ids": [1, *(ord(c) for c in text), 2]}


def test_special_tokens_of_the_tokenizer_stay_where_they_belong() -> None:
    row = {"prompt": "a", "completion": "b"}
    found = tokenize(row, TEMPLATES["prompt_completion"], EndsEveryText(), 100, True)
    assert found == {"input_ids": [1, 97, 98, 2], "labels": [IGNORE, IGNORE, 98, 2]}


def config_of(path: Path, **values: Any) -> Config:
    """A run over `path`, two clients."""
    return Config(**{"train_file": str(path), "num_clients": 2, "max_length": 64, **values})


def keys(data: FederatedData, part: str) -> list[list[tuple[int, ...]]]:
    """Every client's rows of that part, as values to compare."""
    return [[tuple(row["input_ids"]) for row in getattr(c, part)] for c in data.clients]


def test_rows_without_a_token_to_learn_from_are_dropped_and_counted(
    tokenizer: Any, tmp_path: Path
) -> None:
    values = [{"prompt": "x" * n, "completion": "y"} for n in (2, 3, 9, 10, 11, 40)]
    write_jsonl(tmp_path / "x.jsonl", values)
    data = load_data(config_of(tmp_path / "x.jsonl", max_length=10), tokenizer)
    kept = sorted(len(row["labels"]) for c in data.clients for row in c.train)
    assert (kept, list(data.dropped.values())) == ([4, 5, 10], [3])
    with pytest.raises(
        fedlora.InputError, match=r"all .* rows are dropped.* max_length 2.*; use a"
    ):
        load_data(config_of(tmp_path / "x.jsonl", max_length=2), tokenizer)


def test_a_share_of_every_client_is_held_out(tokenizer: Any, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "x.jsonl", [{"text": f"row {i:03}"} for i in range(41)])
    path = tmp_path / "x.jsonl"
    whole = keys(load_data(config_of(path), tokenizer), "train")
    data = load_data(config_of(path, client_eval_fraction=0.25), tokenizer)
    train, held = keys(data, "train"), keys(data, "eval")
    assert [len(part) for part in held] == [5, 5]
    for ours, trained, out in zip(whole, train, held, strict=True):
        assert not set(trained) & set(out)
        assert set(trained) | set(out) == set(ours)
        assert len(trained) + len(out) == len(ours)
    # Without other data, the global evaluation is on what all clients held out.
    # in turn, so that a limit takes some of every client's.
    in_turn = [row for pair in zip(*held, strict=True) for row in pair]
    assert [tuple(row["input_ids"]) for row in data.eval] == in_turn
    few = load_data(config_of(path, client_eval_fraction=0.25, max_eval_samples=4), tokenizer)
    chosen = [tuple(row["input_ids"]) for row in few.eval]
    assert [len(set(chosen) & set(part)) for part in held] == [2, 2]
    assert chosen != in_turn[:4]  # drawn, not the first
    assert few.taken == ("4 of 10 rows are evaluated on (max_eval_samples)",)
    assert keys(load_data(config_of(path, client_eval_fraction=0.25), tokenizer), "eval") == held
    other = load_data(config_of(path, client_eval_fraction=0.25, seed=5), tokenizer)
    assert keys(other, "eval") != held


def test_an_evaluation_file_takes_the_place_of_what_clients_held_out(
    tokenizer: Any, tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "x.jsonl", [{"text": f"row {i:03}"} for i in range(20)])
    write_jsonl(tmp_path / "e.jsonl", [{"text": f"other {i}"} for i in range(7)])
    data = load_data(
        config_of(
            tmp_path / "x.jsonl",
            client_eval_fraction=0.2,
            eval_file=str(tmp_path / "e.jsonl"),
            max_eval_samples=3,
        ),
        tokenizer,
    )
    wanted = [[*letters(tokenizer, f"other {i}"), 2] for i in range(7)]
    places = [wanted.index(row["input_ids"]) for row in data.eval]
    assert len(places) == 3
    assert places == sorted(places) != [0, 1, 2]
    assert [len(part) for part in keys(data, "eval")] == [2, 2]


def test_the_number_of_rows_is_limited_per_client(tokenizer: Any, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "x.jsonl", [{"text": f"row {i:03}"} for i in range(20)])
    path = tmp_path / "x.jsonl"
    data = load_data(config_of(path, max_train_samples=4), tokenizer)
    assert [len(c.train) for c in data.clients] == [4, 4]
    assert data.taken == ("8 of 20 rows are trained on (max_train_samples)",)
    whole = keys(load_data(config_of(path), tokenizer), "train")
    firsts = 0
    for ours, all_rows in zip(keys(data, "train"), whole, strict=True):
        places = [all_rows.index(row) for row in ours]
        assert places == sorted(places)
        firsts += places == [0, 1, 2, 3]
    assert firsts < 2
    # By the seed: the same again, others with another.
    again = load_data(config_of(path, max_train_samples=4), tokenizer)
    assert again.fingerprint == data.fingerprint
    # A limit that leaves all changes nothing.
    assert keys(load_data(config_of(path, max_train_samples=10), tokenizer), "train") == whole
    assert load_data(config_of(path, max_train_samples=10), tokenizer).taken == ()


def test_rows_of_a_sorted_file_are_drawn_from_all_of_it(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"text": "ab", "label": f"c{i // 10:02}"} for i in range(770)]
    write_jsonl(tmp_path / "x.jsonl", rows)
    write_jsonl(tmp_path / "e.jsonl", rows)
    config = config_of(
        tmp_path / "x.jsonl",
        label_column_name="label",
        eval_file=str(tmp_path / "e.jsonl"),
        max_eval_samples=250,
        max_train_samples=200,
    )
    data = load_data(config, tokenizer)
    assert len({row["label"] for row in data.eval}) > 65
    assert len({row["label"] for row in data.clients[0].train}) > 60
    assert data.taken == (
        "400 of 770 rows are trained on (max_train_samples)",
        "250 of 770 rows are evaluated on (max_eval_samples)",
    )


def test_a_row_that_lacks_a_value_is_named(tokenizer: Any, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "x.jsonl", [*rows(4), {"prompt": "here", "completion": None}])
    with pytest.raises(
        fedlora.InputError, match=r"the training data: row 5 has no completion: .*here"
    ):
        load_data(config_of(tmp_path / "x.jsonl"), tokenizer)
    write_jsonl(tmp_path / "x.jsonl", rows(4))
    write_jsonl(tmp_path / "e.jsonl", [*rows(1), {"completion": "here"}])
    config = config_of(tmp_path / "x.jsonl", eval_file=str(tmp_path / "e.jsonl"))
    with pytest.raises(fedlora.InputError, match=r"evaluation data: row \d has no prompt: .*her"):
        load_data(config, tokenizer)


def test_mixed_columns_in_one_file(tokenizer: Any, tmp_path: Path) -> None:
    """Alternatives may change from row to row."""
    write_jsonl(
        tmp_path / "x.jsonl",
        [{"instruction": "a", "output": "b"}, {"instruction": "a", "response": "b"}],
    )
    data = load_data(config_of(tmp_path / "x.jsonl", max_length=1000), tokenizer)
    assert data.clients[0].train == data.clients[1].train


def test_the_fingerprint_knows_every_token(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    write_jsonl(path, rows(8))
    first = load_data(config_of(path), tokenizer).fingerprint
    assert load_data(config_of(path), tokenizer).fingerprint == first
    for other in ({"seed": 1}, {"completion_only_loss": False}, {"client_eval_fraction": 0.25}):
        assert load_data(config_of(path, **other), tokenizer).fingerprint != first
    changed = rows(8)
    changed[3]["completion"] += "!"
    write_jsonl(path, changed)
    assert load_data(config_of(path), tokenizer).fingerprint != first


def test_a_pattern_is_one_file_per_client_even_with_one_file(
    tokenizer: Any, tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "site_0.jsonl", [{"text": f"row {i:03}"} for i in range(20)])
    values = {"train_file": str(tmp_path / "site_*.jsonl")}
    assert [len(c.train) for c in load_data(Config(**values), tokenizer).clients] == [20]
    with pytest.raises(fedlora.InputError, match="partition: dirichlet divides one data set"):
        load_rows(Config(**values, partition="dirichlet", partition_column="text"))


def test_nan_is_nothing_wherever_it_stands(tokenizer: Any, tmp_path: Path) -> None:
    """pandas writes it for a missing value: to JSON by `json.dumps(frame.to_dict("records"))`."""
    nan = float("nan")
    path = tmp_path / "x.json"
    row = {"instruction": "a", "input": nan, "output": "b", "system": nan, "history": nan}
    for values in ([row], [row, {**row, "input": "i"}]):
        path.write_text(json.dumps(values))
        assert read_rows(path)[0] == {**row, "input": None, "system": None, "history": None}
    write_parquet(tmp_path / "x.parquet", [row, row])
    assert read_rows(tmp_path / "x.parquet")[0]["input"] is None
    data = load_data(config_of(path, num_clients=1, max_length=500), tokenizer)
    plain = {"instruction": "a", "output": "b"}
    assert data.clients[0].train[0] == tokenize(plain, TEMPLATES["alpaca"], tokenizer, 500, True)
    # Within lists and objects, and as a row from Python.
    path.write_text('[{"messages": [{"role": "user", "content": NaN, "x": [NaN, {"y": NaN}]}]}]')
    assert read_rows(path)[0]["messages"][0] == {
        "role": "user", "content": None, "x": [None, {"y": None}],
    }  # fmt: skip
    for name in ("alpaca", "prompt_completion"):
        given = {"instruction": "a", "input": np.float32("nan"), "output": "b"}
        given |= {"prompt": "a", "completion": "b"}
        wanted = {key: value for key, value in given.items() if key != "input"}
        template = TEMPLATES[name]
        found = [tokenize(x, template, tokenizer, 500, True) for x in (given, wanted)]
        assert found[0] == found[1]


@pytest.mark.parametrize("ending", ["json", "parquet", "csv"])
@pytest.mark.parametrize("column", ["prompt", "completion", "text", "label", "site"])
def test_nan_in_a_column_that_is_needed_is_named(
    column: str, ending: str, tokenizer: Any, tmp_path: Path
) -> None:
    good = {"prompt": "a", "completion": "b", "text": "t", "label": "c", "site": "s"}
    values = [good, {**good, "label": "d"}, {**good, column: float("nan")}]
    if ending == "parquet":
        import pandas

        pandas.DataFrame(values).to_parquet(tmp_path / "x.parquet")
    else:
        (write_json if ending == "json" else write_csv)(tmp_path / f"x.{ending}", values)
    config = config_of(tmp_path / f"x.{ending}", num_clients=1)
    own: dict[str, Any] = {
        "text": {"template": "text"},
        "label": {"label_column_name": "label"},
        "site": {"partition": "column", "partition_column": "site", "num_clients": None},
    }
    config = Config(**{**config.flat(), **own.get(column, {})})
    with pytest.raises(fedlora.InputError, match=rf"row 3 has no {column}"):
        load_data(config, tokenizer)


NO_TEXT = (["b"], {"b": 1}, [], [["b"]])


@pytest.mark.parametrize("value", NO_TEXT, ids=str)
@pytest.mark.parametrize(
    ("column", "settings"),
    [
        ("instruction", {}),
        ("input", {}),
        ("output", {}),
        ("system", {}),
        ("text", {"template": "text"}),
        ("text", {"label_column_name": "label"}),
        ("a", {"prompt_template": "{a}", "completion_template": "{output}"}),
        ("a", {"completion_template": "{a}"}),
    ],
)
def test_lists_and_objects_are_no_text(
    column: str, settings: dict[str, Any], value: Any, tokenizer: Any, tmp_path: Path
) -> None:
    good = {"instruction": "i", "output": "o", "text": "t", "a": "a", "label": "x"}
    write_jsonl(tmp_path / "x.jsonl", [good, {**good, "label": "y"}, {**good, column: value}])
    config = config_of(tmp_path / "x.jsonl", num_clients=1, max_length=500, **settings)
    with pytest.raises(fedlora.InputError) as raised:
        load_data(config, tokenizer)
    message = str(raised.value)
    assert f"column {column} " in message
    assert "row 3" in message
    assert ("a list" if isinstance(value, list) else "an object") in message
    # Alone in its column, too; the file is named.
    write_jsonl(tmp_path / "x.jsonl", [{**good, column: value}, {**good, column: value}])
    if "label_column_name" not in settings:
        with pytest.raises(
            fedlora.InputError, match=rf"x.jsonl, row 1: the column {column} holds a"
        ):
            load_data(config, tokenizer)
    # Numbers and truth become text as ever.
    write_jsonl(tmp_path / "x.jsonl", [{**good, column: 7}, {**good, column: 8, "label": "y"}])
    assert load_data(config, tokenizer).dropped == {}


def test_a_list_in_a_clients_own_file_is_named_with_it(tokenizer: Any, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "s0.jsonl", [{"text": "a"}])
    write_jsonl(tmp_path / "s1.jsonl", [{"text": ["a", "b"]}])
    config = Config(train_file=str(tmp_path / "s*.jsonl"))
    with pytest.raises(
        fedlora.InputError, match=r"column text mixes types.* s1.jsonl, row 1 a list"
    ):
        load_data(config, tokenizer)
    write_jsonl(tmp_path / "s0.jsonl", [{"text": b"a".hex()}])
    (tmp_path / "s1.jsonl").unlink()
    write_jsonl(tmp_path / "e.jsonl", [{"text": {"a": 1}}])
    config = config_of(tmp_path / "s0.jsonl", num_clients=1, eval_file=str(tmp_path / "e.jsonl"))
    with pytest.raises(
        fedlora.InputError, match=r"e.jsonl, row 1: the column text holds an object"
    ):
        load_data(config, tokenizer)


def test_columns_that_are_not_used_are_named_once(tokenizer: Any, tmp_path: Path) -> None:
    row = {"instruction": "a", "output": "b", "system": "s", "history": [], "id": 1, "topic": "x"}
    write_jsonl(tmp_path / "x.jsonl", [row] * 4)
    config = config_of(tmp_path / "x.jsonl", max_length=500)
    assert load_data(config, tokenizer).taken == ("columns not used: id, topic",)
    by_topic = config_of(
        tmp_path / "x.jsonl",
        num_clients=None,
        partition="column",
        partition_column="topic",
        max_length=500,
    )
    assert load_data(by_topic, tokenizer).taken == ("columns not used: id",)


def test_labels_that_differ_by_white_space_get_a_note(tokenizer: Any, tmp_path: Path) -> None:
    labels = ["spam", "spam ", "ham", "Ham", "eggs", "egg s"]
    write_jsonl(tmp_path / "x.jsonl", [{"text": "t", "label": label} for label in labels * 2])
    data = load_data(config_of(tmp_path / "x.jsonl", label_column_name="label"), tokenizer)
    assert data.notes == (
        "labels that differ by white space or capitals alone are counted as different: "
        "'Ham' and 'ham'; 'spam' and 'spam '",
    )


def test_a_system_text_and_earlier_turns_of_alpaca_rows(tokenizer: Any) -> None:
    lead = (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n"
    )

    def asked(text: str) -> str:
        return f"### Instruction:\n{text}\n\n### Response:\n"

    row = {"instruction": "c", "output": "d", "system": "Be kind.", "history": [["a", "b"]]}
    pieces = [
        (f"Be kind.\n\n{lead}{asked('a')}", False),
        ("b</s>", True),
        (f"\n\n{asked('c')}", False),
        ("d</s>", True),
    ]
    wanted = [
        (token, learn)
        for text, learn in pieces
        for part in text.replace("</s>", "\0")
        for token in ([2] if part == "\0" else letters(tokenizer, part))
    ]
    found = tokenize(row, TEMPLATES["alpaca"], tokenizer, 999, True)
    assert found["input_ids"] == [token for token, _ in wanted]
    assert found["labels"] == [token if learn else IGNORE for token, learn in wanted]
    everything = tokenize(row, TEMPLATES["alpaca"], tokenizer, 999, False)
    assert everything["labels"] == found["input_ids"]
    # As text of a CSV file; nothing of it where there is nothing.
    as_text = {**row, "history": json.dumps(row["history"])}
    assert tokenize(as_text, TEMPLATES["alpaca"], tokenizer, 999, True) == found
    plain = {"instruction": "c", "output": "d"}
    for nothing in (None, [], float("nan")):
        empty = {**plain, "system": "", "history": nothing}
        assert tokenize(empty, TEMPLATES["alpaca"], tokenizer, 999, True) == tokenize(
            plain, TEMPLATES["alpaca"], tokenizer, 999, True
        )
    for wrong in ("a", [["a"]], [["a", None]], [["a", ["b"]]], {"a": "b"}, 3):
        with pytest.raises(fedlora.InputError, match="history"):
            tokenize({**row, "history": wrong}, TEMPLATES["alpaca"], tokenizer, 999, True)


def test_a_data_set_that_was_saved_to_disk(tokenizer: Any, tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    kinds = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    parts = {
        name: Dataset.from_list([{"text": f"{name} {i}", "label": i % 2} for i in range(10)], kinds)
        for name in ("train", "test")
    }
    parts["train"].save_to_disk(str(tmp_path / "one"))
    DatasetDict(parts).save_to_disk(str(tmp_path / "all"))
    wanted = [{"text": f"train {i}", "label": ("no", "yes")[i % 2]} for i in range(10)]
    assert read_hub(str(tmp_path / "one"), None, "train") == wanted
    assert read_hub(str(tmp_path / "all"), None, "train") == wanted
    assert read_hub(str(tmp_path / "all"), None, "train[:30%]") == wanted[:3]
    assert len(read_hub(str(tmp_path / "all"), None, "train[5:]+test")) == 15
    config = Config(
        dataset_name=str(tmp_path / "all"),
        dataset_test_split="test",
        num_clients=2,
        label_column_name="label",
    )
    data = load_data(config, tokenizer)
    assert (data.label_names, len(data.eval)) == (("no", "yes"), 10)
    for name, split, says in (
        ("all", "validation", "it has train, test"),
        ("one", "test", "it has train"),
    ):
        with pytest.raises(fedlora.InputError, match=rf"split '{split}' cannot be loaded: {says}"):
            read_hub(str(tmp_path / name), None, split)
    with pytest.raises(fedlora.InputError, match=r"is no file; .* is given as dataset_name"):
        read_rows(tmp_path / "all")
    with pytest.raises(fedlora.InputError, match=r"dataset_config: .* has no configurations"):
        read_hub(str(tmp_path / "all"), "main", "train")
