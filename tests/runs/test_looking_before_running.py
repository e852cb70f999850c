"""Looking before running, as a user types it: partition, data, run --dry_run."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fedlora
from fedlora.commands.cli import main
from fedlora.commands.views.partition import _cells
from fedlora.config.config import Config
from fedlora.config.yaml_file import read_yaml
from fedlora.data.datasets import load_rows
from support.rows import (
    rows,
    write_jsonl,
)
from support.views import (
    Say,
    _offline,  # noqa: F401
    _signals_as_they_were,  # noqa: F401
    bars_of,
    files,
    here,  # noqa: F401
    say,  # noqa: F401
    table_of,
)

SITES = "site_0.jsonl site_1.jsonl site_2.jsonl site_3.jsonl"


def counts_of(config: Config, column: str) -> list[Counter[str]]:
    """What each client holds, counted from its rows."""
    return [Counter(str(row[column]) for row in own) for own in load_rows(config).clients]


DIVISIONS = [
    "--partition dirichlet --partition_column kind --partition_alpha 0.3 --num_clients 4",
    "--partition labels --partition_column kind --partition_labels_per_client 3 --num_clients 5",
    "--partition quantity --num_clients 3 --by kind",
    "--partition quantity --partition_shares 4 3 2 1 --by kind",
    "--num_clients 6 --by kind",
]


@pytest.mark.parametrize("line", DIVISIONS)
def test_the_table_of_who_holds_what(line: str, say: Say) -> None:
    text = say(f"partition --train_file all.jsonl {line} --client_ranks 5")
    keys = line.replace(" --by kind", "").replace("--", " ").split("  ")
    values: dict[str, Any] = {}
    for key, *value in (part.split() for part in keys):
        values[key] = value if len(value) > 1 else value[0]
    held = counts_of(Config(train_file="all.jsonl", **values), "kind")
    headings, body = table_of(text)
    assert headings[:4] == ["client", "rank", "rows", "share"]
    kinds = headings[5::2]
    assert headings[4::2] == list("abcdefghij")
    assert set(kinds) == {row["kind"] for row in rows(60)}
    total = sum(held, Counter[str]())
    assert [total[k] for k in kinds] == sorted(total.values(), reverse=True)
    assert len(body) == len(held)
    for client, (own, cells) in enumerate(zip(held, body, strict=True)):
        numbers = [str(own[kind]) if own[kind] else "-" for kind in kinds]
        size = own.total()
        assert cells == [str(client), "5", str(size), f"{size / 60:.1%}", *numbers]


@pytest.mark.parametrize("line", DIVISIONS)
def test_bars_add_up(line: str, say: Say) -> None:
    text = say(f"partition --train_file all.jsonl {line} --client_ranks 5")
    _, body = table_of(text)
    bars = bars_of(text)
    assert list(bars) == list(range(len(body)))
    sizes = [int(cells[2]) for cells in body]
    longest = max(len(bar) for bar, _ in bars.values())
    assert longest == 80 - 14
    for client, (bar, number) in bars.items():
        assert number == sizes[client]
        assert abs(len(bar) - longest * number / max(sizes)) <= 0.5
        assert bar == "".join(sorted(bar))
        for letter, cell in zip("abcdefghij", body[client][4:], strict=True):
            held = 0 if cell == "-" else int(cell)
            assert abs(bar.count(letter) - longest * held / max(sizes)) <= 1
    assert max(map(len, text.splitlines())) <= 80


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=12), st.floats(0, 120))
def test_the_parts_of_a_bar_add_up_to_its_width(counts: list[int], width: float) -> None:
    cells = _cells(counts, width)
    assert min(cells) >= 0
    assert sum(cells) == (round(width) if sum(counts) else 0)
    for cell, count in zip(cells, counts, strict=True):
        assert abs(cell - width * count / max(sum(counts), 1)) <= 1


def test_sites_are_named_and_the_evaluation_is_counted(say: Say, here: Path) -> None:
    text = say("partition my.yaml")
    assert text.splitlines()[0] == "site_*.jsonl: 60 rows, 4 clients, one file per client, seed 42"
    headings, body = table_of(text)
    assert headings == ["client", "holds", "rank", "rows", "share"]
    assert body == [
        ["0", "site_0.jsonl", "8", "24", "40.0%"],
        ["1", "site_1.jsonl", "4", "16", "26.7%"],
        ["2", "site_2.jsonl", "2", "12", "20.0%"],
        ["3", "site_3.jsonl", "2", "8", "13.3%"],
        ["eval", "10"],
    ]
    assert {k: n for k, (_, n) in bars_of(text).items()} == {0: 24, 1: 16, 2: 12, 3: 8}
    assert set("".join(bar for bar, _ in bars_of(text).values())) == {"a"}


def test_many_columns_fit_without_cutting_a_number(say: Say) -> None:
    """In 80 columns, where it is written to a file or a pipe."""
    text = say("partition my.yaml --by kind")
    headings, body = table_of(text)
    assert headings[:5] == ["client", "holds", "rank", "rows", "share"]
    assert "…" not in text
    assert [cells[2:5] for cells in body[:4]] == [
        ["8", "24", "40.0%"],
        ["4", "16", "26.7%"],
        ["2", "12", "20.0%"],
        ["2", "8", "13.3%"],
    ]
    assert body[4][:2] == ["eval", "10"]


def test_large_numbers_are_not_cut(say: Say, here: Path) -> None:
    values = [{"text": "a", "site": f"hospital number {i % 9}"} for i in range(18_000)]
    write_jsonl(here / "big.jsonl", values)
    text = say("partition --train_file big.jsonl --partition column --partition_column site")
    assert text.startswith("big.jsonl: 18,000 rows, 9 clients, column by site, seed 42\n")
    assert text.count(" 11.1% ") == 9
    assert len(re.findall(r" 2,000\b", text)) == 9 * 3  # of rows, of its value, after its bar


def test_a_column_divided_by_names_the_clients(say: Say, here: Path) -> None:
    values = [{"text": "a", "site": f"s{i % 3 + 9}"} for i in range(12)]
    write_jsonl(here / "x.jsonl", values)
    text = say("partition --train_file x.jsonl --partition column --partition_column site")
    headings, body = table_of(text)
    assert headings == [
        "client",
        "holds",
        "rank",
        "rows",
        "share",
        "a",
        "s9",
        "b",
        "s10",
        "c",
        "s11",
    ]
    assert body == [
        ["0", "s9", "16", "4", "33.3%", "4", "-", "-"],
        ["1", "s10", "16", "4", "33.3%", "-", "4", "-"],
        ["2", "s11", "16", "4", "33.3%", "-", "-", "4"],
    ]
    assert text.rstrip().endswith("a  s9   b  s10   c  s11")


def test_rare_values_are_summed_up(say: Say, here: Path) -> None:
    values = [{"text": "a", "kind": f"k{min(i, 15 - i)}" if i < 15 else "k0"} for i in range(40)]
    write_jsonl(here / "x.jsonl", [*values, *({"text": "a", "kind": f"z{i}"} for i in range(5))])
    text = say("partition --train_file x.jsonl --num_clients 2 --by kind")
    counts = Counter(row["kind"] for row in values) + Counter(f"z{i}" for i in range(5))
    shown = [kind for kind, _ in counts.most_common(9)]
    assert f"j  {len(counts) - 9} others" in text
    _, body = table_of(text)
    others = sum(int(c[-1].replace("-", "0")) for c in body)
    assert others == sum(n for kind, n in counts.items() if kind not in shown)
    assert all(f" {kind} " in text for kind in shown)
    assert sum(int(c) for row in body for c in row[4:] if c != "-") == 45


def test_ranks_are_those_of_the_run(say: Say, here: Path) -> None:
    (here / "own").mkdir()
    (here / "own" / "a.yaml").write_text("{}")
    (here / "own" / "b.yaml").write_text("lora_r: 9\n")
    line = "partition --train_file all.jsonl --num_clients 3 --lora_r 6"
    assert [cells[1] for cells in table_of(say(line))[1]] == ["6", "6", "6"]
    own = table_of(say(line + " --client_overrides 'own/*.yaml'"))[1]
    assert [cells[1] for cells in own] == ["6", "9", "6"]


def test_the_embedded_data_are_shown_without_a_file(say: Say) -> None:
    text = say("partition")
    assert text.startswith("embedded instructions: 2,400 rows, 10 clients, dirichlet (alpha 0.2) ")
    headings, body = table_of(text)
    assert headings[:4] == ["client", "rank", "rows", "share"]
    ranks = read_yaml(Path(fedlora.__file__).parent / "embedded" / "config.yaml")["client_ranks"]
    assert [int(cells[1]) for cells in body[:-1]] == ranks
    assert sum(int(cells[2]) for cells in body[:-1]) == 2400
    assert body[-1][:2] == ["eval", "480"]


def test_values_with_brackets_stay_as_they_are(say: Say, here: Path) -> None:
    write_jsonl(here / "x[1].jsonl", [{"text": "a", "kind": "[bold]x[/bold]"}] * 4)
    text = say("partition --train_file 'x[1].jsonl' --num_clients 2 --by kind")
    assert "a [bold]x[/bold]" in text
    assert text.startswith("x[1].jsonl: 4 rows")


def test_a_long_text_does_not_fill_the_screen(say: Say, here: Path) -> None:
    """A column of texts is an odd thing to count, and a table all the same."""
    write_jsonl(here / "x.jsonl", [{"text": "word " * 200 + str(i)} for i in range(4)])
    text = say("partition --train_file x.jsonl --num_clients 2 --by text")
    assert len(text.splitlines()) < 40


MARKS = {"png": b"\x89PNG\r\n\x1a\n", "svg": b"<?xml", "pdf": b"%PDF-"}


@pytest.mark.parametrize("ending", list(MARKS))
def test_the_picture(ending: str, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (here / "deep").mkdir()
    before = set(files(here))
    line = f"partition my.yaml --by kind --output deep/who.{ending}"
    assert main(shlex.split(line)) == 0
    captured = capfd.readouterr()
    assert captured.err == ""
    assert captured.out.endswith(f"picture: deep/who.{ending}\n")
    assert set(files(here)) - before == {f"deep/who.{ending}"}
    content = (here / "deep" / f"who.{ending}").read_bytes()
    assert content.startswith(MARKS[ending])
    assert len(content) > 5000


def test_the_picture_shows_who_holds_what(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names, ranks and values stand in it as text."""
    monkeypatch.setitem(__import__("matplotlib").rcParams, "svg.fonttype", "none")
    assert main(shlex.split("partition my.yaml --by kind --output=who.svg")) == 0
    text = (here / "who.svg").read_text()
    for client, (site, rank) in enumerate(zip(SITES.split(), (8, 4, 2, 2), strict=True)):
        assert f">{client} {site}  (r={rank})<" in re.sub(r"&#160;|\u00a0", " ", text)
    for kind in {row["kind"] for row in rows(60)}:
        assert f">{kind}</text>" in text
    assert "site_*.jsonl: 60 rows, 4 clients" in text


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "value", ["$5 to $7", r"$\alpha$ or $\nonsense$", "_hidden", "50% & <b>", "日本", "a\nb", ""]
)
def test_a_picture_of_any_value(
    value: str, here: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What means something to the drawing library is text all the same."""
    monkeypatch.setitem(__import__("matplotlib").rcParams, "svg.fonttype", "none")
    values = [{"text": "a", "kind": kind} for kind in (value, "plain")] * 3
    write_jsonl(here / "x.jsonl", values)
    line = ["--train_file", "x.jsonl", "--partition", "column", "--partition_column", "kind"]
    assert main(["partition", *line, "--output", "who.svg"]) == 0
    assert capfd.readouterr().err == ""
    found = (here / "who.svg").read_text()
    if value.isprintable() and value:
        shown = value.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        assert f">{shown}</text>" in found, "in the legend"
        assert re.search(rf">\d {re.escape(shown)}\s+\(r=16\)</text>", found), "of a client"


@pytest.mark.parametrize(
    ("output", "says"),
    [
        ("who.gif", "--output who.gif: a picture's name ends in .png, .svg, .pdf"),
        ("who", "--output who: a picture's name ends in .png, .svg, .pdf"),
        ("no/who.png", "--output no/who.png: there is no directory no"),
        ("my.yaml/who.png", "--output my.yaml/who.png: there is no directory my.yaml"),
        ("folder.png", "--output folder.png: "),
    ],
)
def test_a_picture_that_cannot_be_written(
    output: str, says: str, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (here / "folder.png").mkdir()
    before = files(here)
    assert main(["partition", "my.yaml", "--output", output]) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"fedlora: {says}")
    assert captured.err.count("\n") == 1
    assert files(here) == before


def samples_of(text: str) -> list[tuple[str, str]]:
    """The samples: heading and text."""
    body = text.partition("the others are context\n")[2].strip("\n")
    return [(block.split("\n", 1)[0], block.split("\n", 1)[1]) for block in body.split("\n\n")]


def test_samples_with_what_is_learnt_in_brackets(say: Say) -> None:
    text = say("data my.yaml --show 4")
    assert samples_of(text) == [wanted(client) for client in range(4)]
    assert samples_of(text)[1] == ("client 1, 12 tokens, 6 learnt", "figla>[a][l][g][i][f][</s>]")


def wanted(client: int) -> tuple[str, str]:
    """The first sample of a client, a token per letter."""
    offset = (0, 24, 40, 52)[client]
    [row] = rows(1, offset)
    prompt, completion = row["prompt"], row["completion"]
    learnt = "".join(f"[{letter}]" for letter in completion) + "[</s>]"
    number = len(completion) + 1
    return f"client {client}, {len(prompt) + number} tokens, {number} learnt", prompt + learnt


def test_the_counts_of_the_data(say: Say, here: Path) -> None:
    text = " ".join(say("data my.yaml --max_length 18").split())
    every = [row for offset, n in ((0, 24), (24, 16), (40, 12), (52, 8)) for row in rows(n, offset)]
    whole = [len(r["prompt"]) + len(r["completion"]) + 1 for r in every]
    lengths = sorted(min(n, 18) for n in whole)
    learnt = sum(min(n, 18) - len(r["prompt"]) for n, r in zip(whole, every, strict=True))
    assert "template prompt_completion: 60 rows of 4 clients, 10 to evaluate on" in text
    assert (
        f"tokens of a row: least {lengths[0]}, median {lengths[30]}, 95% {lengths[57]}, most 18; "
        f"{lengths.count(18)} reach max_length 18" in text
    )
    assert f"a loss is taken on {learnt / sum(lengths):.1%} of {sum(lengths):,} tokens" in text
    assert "dropped" not in text


def test_everything_is_learnt_where_it_is_asked_for(say: Say) -> None:
    text = say("data my.yaml --completion_only_loss false --show 1")
    [(heading, shown)] = samples_of(text)
    assert heading == "client 0, 16 tokens, 16 learnt"
    assert shown.startswith("[s][t][o][n][e][s][t][>][t]")


def test_dropped_rows_and_their_reasons(say: Say, here: Path) -> None:
    values = [*rows(6), {"prompt": "x" * 30, "completion": "y"}, {"prompt": "", "completion": ""}]
    write_jsonl(here / "x.jsonl", values)
    line = "data my.yaml --train_file x.jsonl --client_ranks none --num_clients 1 --max_length 25"
    text = say(line + " --eval_file none")
    assert "6 rows of 1 clients, 0 to evaluate on" in text
    assert "1 row is dropped: cut to max_length 25, it has no token left to learn from" in text
    assert "1 row is dropped: no token to learn from" in text


@pytest.mark.parametrize("number", [0, 1, 2, 3, 5, 7])
def test_as_many_samples_as_asked_for(number: int, say: Say, here: Path) -> None:
    """From every client in turn, one of which has a single row."""
    values = [{"text": f"row {i}", "site": "b" if i else "a"} for i in range(9)]
    write_jsonl(here / "x.jsonl", values)
    model = read_yaml(here / "my.yaml")["model_name_or_path"]
    line = f"data --model_name_or_path {model} --train_file x.jsonl --partition column "
    text = say(line + f"--partition_column site --show {number}")
    assert len(re.findall(r"^client \d, \d+ tokens, \d+ learnt$", text, re.M)) == number
    if number > 1:
        assert "client 0, 6 tokens" in text
        assert "client 1, 6 tokens" in text


def test_three_samples_unless_told(say: Say) -> None:
    assert len(samples_of(say("data my.yaml"))) == 3


def test_a_line_break_is_shown(say: Say, here: Path) -> None:
    write_jsonl(here / "x.jsonl", [{"prompt": "[a]\n", "completion": "b\n"}] * 2)
    line = "data my.yaml --train_file x.jsonl --client_ranks none --num_clients 1 --show 1"
    assert "[a]\\n\n[b][\\n\n][</s>]" in say(line)


def test_the_data_of_a_classifier(say: Say, here: Path) -> None:
    values = [{"text": f"row {i}", "label": ["no", "yes"][i % 2]} for i in range(8)]
    write_jsonl(here / "x.jsonl", values)
    line = "data my.yaml --train_file x.jsonl --client_ranks none --num_clients 2 --show 2"
    text = say(line + " --label_column_name label --eval_file none")
    assert "template classification: 8 rows of 2 clients" in text
    assert "learnt" not in text
    found = re.findall(r"^client (\d), 5 tokens, label (no|yes)\nrow (\d)$", text, re.M)
    assert [client for client, _, _ in found] == ["0", "1"]
    assert all(["no", "yes"][int(i) % 2] == label for _, label, i in found)


def test_a_plan_says_what_it_is_a_plan_of(say: Say, here: Path) -> None:
    model = Path(read_yaml(here / "my.yaml")["model_name_or_path"])
    text = " ".join(say("run my.yaml --dry_run --max_length 18").split())
    assert f"{model.name}: LlamaForCausalLM, 22 K parameters (float32)" in text
    assert (
        "14 target modules: down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in text
    )
    assert "method exact, 2 rounds, 4 of 4 clients in each; batches of 4 x 1, learning rate" in text
    assert "10 rows to evaluate on; template prompt_completion." in text
    every = [row for offset, n in ((0, 24), (24, 16), (40, 12), (52, 8)) for row in rows(n, offset)]
    lengths = [min(len(r["prompt"]) + len(r["completion"]) + 1, 18) for r in every]
    sums = [sum(lengths[i:j]) for i, j in ((0, 24), (24, 40), (40, 52), (52, 60))]
    for client, (rank, size, tokens) in enumerate(
        zip((8, 4, 2, 2), (24, 16, 12, 8), sums, strict=True)
    ):
        assert f" {client} {rank} 2 {size} {tokens} 3 " in text


def test_brackets_of_a_path_stay_in_the_plan(say: Say, here: Path) -> None:
    shutil.copytree(read_yaml(here / "my.yaml")["model_name_or_path"], here / "tiny[red]")
    text = say("run my.yaml --dry_run --model_name_or_path 'tiny[red]'")
    assert "tiny[red]: Llama" in text.replace("\n", "")


def test_warnings_stand_in_the_plan(say: Say, here: Path) -> None:
    text = " ".join(say("run my.yaml --dry_run --max_length 8").split())
    assert "warning: 42 rows are dropped: cut to max_length 8, it has no token left" in text


def test_a_plan_of_the_embedded_run(say: Say, here: Path) -> None:
    text = say("run --dry_run")
    assert text.startswith("embedded: LlamaForCausalLM, 804 K parameters (float32)\n")
    assert len(re.findall(r"^ +\d+ .* [KM]B *$", text, re.M)) == 10


def test_an_extra_that_is_missing_is_found_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def found(name: str, *package: Any) -> Any:
        return None if name == "bitsandbytes" else find_spec(name, *package)

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", found)
    assert main(["run", "--dry_run", "--load_in_4bit", "true"]) == 2
    assert "load_in_4bit: bitsandbytes, which quantises the base" in capsys.readouterr().err


def prepare(here: Path) -> None:
    """What the table below refers to."""
    (here / "full").mkdir()
    (here / "full" / "thesis.txt").write_text("years of work")
    (here / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt"\n')
    (here / "chat.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
        * 4
    )
    (here / "one.jsonl").write_text('{"text": "a", "label": "x"}\n' * 4)
    (here / "own.yaml").write_text("lerning_rate: 1\n")


ONE = "--client_ranks none --eval_file none --train_file "


BAD: list[tuple[str, str]] = [
    ("partition missing.yaml", "missing.yaml: no such configuration file"),
    ("partition my.yaml --by", "--by: give the column to count"),
    ("partition my.yaml --by topic", "'topic' is not a column; there are prompt, completion, kind"),
    ("partition my.yaml --output", "--output: give the picture to write"),
    ("partition my.yaml --train_file bad.jsonl", "train_file: "),
    ("partition my.yaml --num_clients 3", "num_clients: 3, but train_file: "),
    ("partition my.yaml --num_client 3", "num_client: unknown configuration key; did you mean num"),
    ("partition my.yaml --partition dirichlet", "partition: dirichlet needs partition_column"),
    (
        "partition my.yaml --partition labels --partition_column kind",
        "partition: labels divides on",
    ),
    (
        f"partition my.yaml {ONE} all.jsonl --partition column --partition_column sort",
        "partition_column: 'sort' is not a column; there are prompt, completion, kind",
    ),
    (f"partition my.yaml {ONE} all.jsonl --num_clients 61", "num_clients: 61 clients for 60 rows"),
    (
        f"partition my.yaml {ONE} all.jsonl --partition labels --partition_column kind "
        "--partition_labels_per_client 11",
        "partition_labels_per_client: 11, but there are 10 different values",
    ),
    (
        f"partition my.yaml {ONE} all.jsonl --partition_shares 1 2",
        "partition_shares belongs to partition: quantity",
    ),
    (
        "partition my.yaml --client_overrides 'own*.yaml'",
        "client_overrides: client 0: lerning_rate is not a client's own to set; did you mean learn",
    ),
    ("partition my.yaml --client_overrides 'none*.yaml'", "client_overrides: none*.yaml: the patt"),
    ("partition my.yaml --dataset_name nobody/data", "dataset_name: nobody/data: split 'train' ca"),
    ("data my.yaml --show x", "--show x: expected a number of samples"),
    ("data my.yaml --show -1", "--show -1: expected a number of samples"),
    ("data my.yaml --show 1.5", "--show 1.5: expected a number of samples"),
    ("data my.yaml --show", "--show: give the number of samples to show"),
    ("data my.yaml --show=", "--show: give the number of samples to show"),
    ("data my.yaml --model_name_or_path none", "model_name_or_path: name the base model"),
    ("data my.yaml --model_name_or_path nobody/nothing", "model_name_or_path: nobody/nothing: the"),
    ("data my.yaml --template alpaca", "template: alpaca needs the column instruction, output or"),
    (f"data my.yaml {ONE} chat.jsonl --num_clients 2", "template: chat needs a chat template, and"),
    (
        f"data my.yaml {ONE} one.jsonl --num_clients 2 --label_column_name label",
        "label_column_name: label has one value (x) in all 4 training rows; a classifier needs two",
    ),
    ("data my.yaml --max_length 2", "client 0 (site_0.jsonl): all 24 rows are dropped: "),
    (
        "run my.yaml --dry_run --resume out",
        "--dry_run checks a run that has not begun; leave --res",
    ),
    ("run --dry_run --resume=out", "--dry_run checks a run that has not begun; leave --resume out"),
    ("run my.yaml --dry_run --output_dir full", "output_dir: full is not empty"),
    ("run my.yaml --dry_run --method fedit", "method: fedit needs one rank for all clients"),
    (
        "run my.yaml --dry_run --clients_per_round 9",
        "clients_per_round: 9, but there are 4 clients",
    ),
    ("run my.yaml --dry_run --lora_target_modules query", "lora_target_modules: 'query' matches n"),
    ("run my.yaml --dry_run --max_length 500 --max_steps 0", "max_steps: 0 trains nothing; give a"),
    (
        f"run my.yaml --dry_run {ONE} one.jsonl --num_clients 2 --load_best_model_at_end",
        "load_best_model_at_end needs something to evaluate on",
    ),
    (
        "run my.yaml --dry_run --client_overrides 'own*.yaml'",
        "client_overrides: client 0: lerning_rate is not a client's own to set; did you mean learn",
    ),
    ("config my.yaml --partition_alpha 0", "partition_alpha: '0' must be greater than 0"),
    ("config my.yaml --client_overrides 1 2", "client_overrides: "),
    ("demo --partition nothing", "partition: 'nothing': expected iid, dirichlet, column, labels"),
]


@pytest.mark.parametrize(("line", "says"), BAD, ids=[line for line, _ in BAD])
def test_bad_input(line: str, says: str, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Exit code 2, one clear line on standard error, nothing written."""
    prepare(here)
    before = files(here), sorted(here.rglob("*"))
    assert main(shlex.split(line)) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"fedlora: {says}")
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    assert (files(here), sorted(here.rglob("*"))) == before
