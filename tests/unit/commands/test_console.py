"""What a person sees of a run, in a terminal, in a log file and as JSON."""

from __future__ import annotations

import io
import json
import os
import random
import re
from typing import Any

import pytest
from rich.console import Console

from fedlora.commands.console import PlainLines, Terminal, json_events, per_class, reporter
from fedlora.commands.json_lines import only_json
from fedlora.text import human_bytes

Event = dict[str, Any]


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 KB"),
        (1536, "1.5 KB"),
        (59_392, "59.4 KB"),
        (2_500_000, "2.5 MB"),
        (7.25e9, "7.2 GB"),
        (3e12, "3.0 TB"),
        (4e15, "4000.0 TB"),
    ],
)
def test_human_bytes(count: float, text: str) -> None:
    assert human_bytes(count) == text


def begin(**more: Any) -> Event:
    return {
        "event": "begin",
        "output_dir": "out",
        "resumed_from": None,
        "model": "tiny",
        "method": "exact",
        "task": "CAUSAL_LM",
        "num_rounds": 3,
        "modules": 14,
        "ranks": [8, 4],
        "rows": [24, 16],
        "eval_rows": 10,
        "choices": ["base in bfloat16: a reason", "clients in one pass: 2"],
        **more,
    }


EVALUATION = {"loss": 4.62632, "perplexity": 102.1375, "token_accuracy": 0.375, "exact_match": 1.0}


def a_round(number: int, **more: Any) -> Event:
    return {
        "event": "round",
        "round": number,
        "aggregation_error": 5.8e-7,
        "bytes_up": 59_392,
        "bytes_down": 230_400,
        "seconds": {"train": 1.0, "aggregate": 0.25, "evaluate": 0.5},
        "evaluation": EVALUATION,
        **more,
    }


def step(client: int, number: int) -> Event:
    return {
        "event": "step",
        "client": client,
        "step": number,
        "steps": 4,
        "loss": 2.5,
        "tokens": 100,
    }


START: Event = {"event": "start", "round": 0, "evaluation": EVALUATION}


END: Event = {"event": "end", "round": 3, "final": 3, "best": 2}


WARNING: Event = {"event": "warning", "message": "/data/[x]/[/bold] is damaged"}


def clients_of(number: int) -> list[Event]:
    events: list[Event] = [{"event": "round_begin", "round": number, "clients": [0, 1]}]
    for client, rank in ((0, 8), (1, 4)):
        events += [{"event": "client_begin", "client": client, "rank": rank}]
        events += [step(client, n) for n in (1, 2, 3, 4)]
        events += [{"event": "client_end", "client": client, "loss": 2.5}]
    return [*events, {"event": "evaluate_begin"}]


def whole_run() -> list[Event]:
    events = [begin(), WARNING, {"event": "evaluate_begin"}, START]
    for number in (1, 2, 3):
        events += [*clients_of(number), a_round(number)]
    return [*events, END]


def test_json_is_one_object_a_line(capfd: pytest.CaptureFixture[str]) -> None:
    with only_json() as emit:
        told_of = json_events(emit)
        for event in whole_run():
            told_of(event)
        print("of a library")
        os.write(1, b"of a process\n")  # as a process does, past sys.stdout
    captured = capfd.readouterr()
    assert captured.err == "of a library\nof a process\n"
    found = [json.loads(line) for line in captured.out.splitlines()]
    told = ["begin", "warning", "start", "round", "round", "round", "end"]
    assert [event["event"] for event in found] == told
    assert found[0] == begin()


def test_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    show = PlainLines()
    for event in whole_run():
        show(event)
    captured = capsys.readouterr()
    assert captured.err == "warning: /data/[x]/[/bold] is damaged\n"
    lines = captured.out.splitlines()
    assert lines[0] == "tiny: 14 target modules, method exact, 3 rounds -> out"
    assert lines[1] == "2 clients, ranks 8 4, rows 24 16; 10 rows to evaluate on"
    assert lines[2] == "base in bfloat16: a reason; clients in one pass: 2"
    assert " ".join(lines[3].split()) == "round loss ppl token acc exact agg. err up down seconds"
    assert lines[4].split() == ["0", "4.6263", "102.14", "37.5%", "100.0%", *"----"]
    row = "1 4.6263 102.14 37.5% 100.0% 5.8e-07 59.4 KB 230.4 KB 1.8"
    assert lines[5].split() == row.split()
    assert [line.split()[0] for line in lines[4:]] == ["0", "1", "2", "3"]
    assert "\x1b" not in captured.out


def test_columns_stand_below_their_heads(capsys: pytest.CaptureFixture[str]) -> None:
    extreme = {"loss": 12.3456, "perplexity": 2.3e5, "token_accuracy": 1.0, "exact_match": 1.0}
    show = PlainLines()
    for event in (
        begin(choices=[]),  # what leaves nothing open has no line about it
        START,
        a_round(1),
        a_round(999, evaluation=extreme, bytes_up=999_900, bytes_down=1, seconds={"train": 99_999}),
        a_round(2, evaluation=None, aggregation_error=None),
    ):
        show(event)
    _, _, head, *rows = capsys.readouterr().out.splitlines()
    assert len(head) < 80  # it must not wrap in a terminal of 80 columns
    assert {len(row) for row in rows} == {len(head)}
    ends = [match.end() for match in re.finditer(r"round|loss|ppl|acc|exact|err|up|down|s$", head)]
    for row in rows:
        assert [row[end - 1 : end + 1].strip() != "" for end in ends] == [True] * 9
        assert [row[end : end + 1].strip() for end in ends] == [""] * 9


def test_no_evaluation(capsys: pytest.CaptureFixture[str]) -> None:
    show = PlainLines()
    for event in (
        begin(eval_rows=0),
        {"event": "start", "round": 0},
        {k: v for k, v in a_round(1, aggregation_error=None).items() if k != "evaluation"},
    ):
        show(event)
    *_, start, first = capsys.readouterr().out.splitlines()
    assert start.split() == ["0", *"--------"]
    assert first.split() == ["1", *"-----", "59.4", "KB", "230.4", "KB", "1.8"]


@pytest.mark.parametrize(
    ("round_number", "line"), [(2, "resumed after round 2"), (0, "resumed from the start")]
)
def test_resumed(round_number: int, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    PlainLines()(begin(resumed_from=round_number))
    assert capsys.readouterr().out.splitlines()[3] == line


def test_many_clients_are_summed_up(capsys: pytest.CaptureFixture[str]) -> None:
    PlainLines()(begin(ranks=[4] * 99 + [64], rows=list(range(100))))
    line = capsys.readouterr().out.splitlines()[1]
    assert line == (
        "100 clients, ranks 4 4 4 4 4 4 4 4 ... (from 4 to 64), "
        "rows 0 1 2 3 4 5 6 7 ... (from 0 to 99); 10 rows to evaluate on"
    )


@pytest.fixture
def console() -> Console:
    """A terminal of 80 columns whose output is kept."""
    return Console(
        file=io.StringIO(), force_terminal=True, width=80, height=24, _environ={"TERM": "xterm"}
    )


def shown(console: Console) -> str:
    """All that was written to the terminal."""
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def plain(text: str) -> str:
    """What stays on the screen, line by line, without colours."""
    lines = [line.rpartition("\x1b[2K")[2] for line in text.split("\n")]
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\r", "", "\n".join(lines))


HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"


def test_a_whole_run(console: Console) -> None:
    with Terminal(console) as terminal:
        for event in whole_run():
            terminal(event)
    text = plain(shown(console))
    assert "tiny: 14 target modules, method exact, 3 rounds -> out\n" in text
    assert "2 clients, ranks 8 4, rows 24 16; 10 rows to evaluate on\n" in text
    assert "warning: /data/[x]/[/bold] is damaged\n" in text
    rows = re.findall(r"^ +(\d) +4\.6263 .*$", text, re.M)
    assert rows == ["0", "1", "2", "3"]
    assert max(map(len, text.splitlines())) <= 80


def test_the_cursor_comes_back(console: Console) -> None:
    with Terminal(console) as terminal:
        terminal(begin())
        assert HIDE in shown(console)
        assert SHOW not in shown(console)
    assert shown(console).rstrip().endswith(SHOW) or SHOW in shown(console).rpartition(HIDE)[2]


def test_the_cursor_comes_back_after_an_error(console: Console) -> None:
    def interrupted() -> None:
        with Terminal(console) as terminal:
            terminal(begin())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert SHOW in shown(console).rpartition(HIDE)[2]


def bars(terminal: Terminal) -> str:
    """The bars as they stand now."""
    apart = Console(file=io.StringIO(), width=80)
    apart.print(terminal.progress.get_renderable())
    return shown(apart)


def test_bars(console: Console) -> None:
    with Terminal(console) as terminal:
        assert "loading model and data" in bars(terminal)
        terminal(begin())
        assert "loading" not in bars(terminal)
        terminal({"event": "evaluate_begin"})
        assert "evaluating" in bars(terminal)
        terminal(START)
        assert "evaluating" not in bars(terminal)
        for event in clients_of(1)[:4]:  # up to the second step of the first client
            terminal(event)
        rounds, clients, steps = bars(terminal).splitlines()
        assert re.match(r"rounds +\S* +0/3 ", rounds)
        assert re.match(r"clients +\S* +0/2 +client 0, r=8 ", clients)
        assert re.match(r"steps +\S* +2/4 loss 2\.500, [\d,]+ tokens/s ", steps)
        for event in clients_of(1)[4:9]:  # up to the first step of the second
            terminal(event)
        rounds, clients, steps = bars(terminal).splitlines()
        assert re.match(r"clients +\S* +1/2 +client 1, r=4 ", clients)
        assert re.match(r"steps +\S* +1/4 ", steps)
        for event in [*clients_of(1)[9:], a_round(1)]:
            terminal(event)
        rounds, clients, steps = bars(terminal).splitlines()
        assert re.match(r"rounds +\S* +1/3 ", rounds)
        assert re.match(r"clients +\S* +2/2 ", clients)


def test_bars_of_clients_that_share_a_pass(console: Console) -> None:
    with Terminal(console) as terminal:
        for event in (begin(), START, *clients_of(1)[:2]):
            terminal(event)
        terminal({"event": "client_begin", "client": 1, "rank": 4})
        _, clients, _ = bars(terminal).splitlines()
        assert re.match(r"clients +\S* +0/2 +2 in one pass ", clients)
        for event in (step(0, 1), step(1, 1), step(0, 2)):
            terminal(event)
        rounds, each = terminal.progress.tasks[:2]
        assert (rounds.completed, each.completed) == ((2 / 4 + 1 / 4) / 2, 2 / 4 + 1 / 4)
        _, _, steps = bars(terminal).splitlines()
        assert re.match(r"steps +\S* +2/4 ", steps)
        for event in (step(0, 3), step(1, 2), step(0, 4), step(1, 3), step(1, 4)):
            terminal(event)
        terminal({"event": "client_end", "client": 0})
        assert each.completed == 2  # neither forgotten nor counted twice
        terminal({"event": "client_end", "client": 1})
        assert (rounds.completed, each.completed) == (1, 2)


def test_the_upper_bars_move_within_a_round(console: Console) -> None:
    """Otherwise nobody knows the time left before a round of an hour ends."""
    with Terminal(console) as terminal:
        for event in [begin(), START, *clients_of(1), a_round(1), *clients_of(2)[:9]]:
            terminal(event)
        rounds, clients = (
            task.completed
            for task in terminal.progress.tasks
            if task.description in ("rounds", "clients")
        )
        assert rounds == 1 + (1 + 1 / 4) / 2
        assert clients == 1 + 1 / 4
        assert terminal.progress.speed_estimate_period >= 3600


def test_bars_of_a_resumed_run(console: Console) -> None:
    with Terminal(console, title="flora: ") as terminal:
        terminal(begin(resumed_from=2))
        assert "resumed after round 2\n" in plain(shown(console))
        assert re.match(r"flora: rounds +\S* +2/3 ", bars(terminal))
        for event in clients_of(3)[:6]:
            terminal(event)
        assert terminal.progress.tasks[0].completed == 2.5


def test_brackets_in_a_path_are_no_markup(console: Console) -> None:
    with Terminal(console) as terminal:
        terminal(begin(output_dir="/runs/[/red]/[bold]x"))
    assert "-> /runs/[/red]/[bold]x\n" in plain(shown(console))


def test_reporter(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Event] = []
    with reporter(lambda value: said.append(dict(value))) as report:
        report(START)
        report({"event": "step"})
    assert said == [START]
    monkeypatch.setattr("sys.stdout", io.StringIO())
    with reporter() as report:
        assert isinstance(report, PlainLines)


@pytest.mark.parametrize(("kind", "bars_shown"), [("xterm-256color", True), ("dumb", False)])
def test_reporter_of_a_terminal(
    monkeypatch: pytest.MonkeyPatch, kind: str, bars_shown: bool
) -> None:
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", kind)
    monkeypatch.setattr("sys.stdout", Screen())
    with reporter() as report:
        assert isinstance(report, Terminal) is bars_shown


def labels(scores: dict[str, tuple[float, int]]) -> dict[str, Any]:
    """An evaluation of labels with these F1 and rows."""
    return {
        "per_class": {
            name: {"precision": f1, "recall": f1, "f1": f1, "support": rows}
            for name, (f1, rows) in scores.items()
        }
    }


def test_a_table_of_many_labels_shows_both_ends() -> None:
    order = list(range(77))
    random.Random(0).shuffle(order)
    scores = {f"label {i}": (i / 100, 5) for i in order}
    lines = per_class(labels(scores), "my runs/out")
    names = [line.rpartition("%")[0].split("  ")[0] for line in lines if "%" in line]
    assert names == [f"label {i}" for i in (*range(10), *range(67, 77))]
    assert lines[11] == "... left out: 57 labels between these"
    assert "all 77 labels: metrics.jsonl" in lines[22]
    assert lines[23] == "fedlora report 'my runs/out'"
    assert len(lines) == 24
    assert max(map(len, lines)) <= 80


def test_labels_without_rows_are_neither_best_nor_worst() -> None:
    scores = {f"label {i}": (i / 100, 3 if i % 2 else 0) for i in range(1, 77)}
    text = "\n".join(per_class(labels(scores), "out"))
    assert "left out: 18 labels between these and 38 without a row to evaluate on" in text
    assert "label 1 " in text
    assert "label 2 " not in text
    # Fewer labels with rows than are shown: each stands there once.
    few = per_class(labels({f"label {i}": (i / 100, int(i < 14)) for i in range(30)}), "out")
    assert sum("%" in line for line in few) == 14
    assert "left out: 16 without a row to evaluate on" in "\n".join(few)


@pytest.mark.parametrize("number", [1, 2, 20])
def test_a_short_table_shows_every_label_in_its_order(number: int) -> None:
    scores = {f"label {i}": ((7 * i % 20) / 20, i % 3) for i in range(number)}
    lines = per_class(labels(scores), "out")
    assert [line[:8].strip() for line in lines[1:]] == list(scores)
