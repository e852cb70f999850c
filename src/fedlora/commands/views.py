"""Shows before a run who holds what, what is learnt, and what the run would do.

fedlora partition    show_partition, draw_partition
fedlora data         show_samples
fedlora run --dry_run    show_plan
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from fedlora.adapters.aggregate import Aggregated
from fedlora.client.worker import budget_of
from fedlora.config.config import Config
from fedlora.data.datasets import FederatedData, RawData
from fedlora.data.label_counts import holdings
from fedlora.data.tokenize import IGNORE, Tokens
from fedlora.errors import InputError
from fedlora.lowrank import scaling
from fedlora.model.batches import labelled
from fedlora.runs.checks import dropped_line
from fedlora.runs.session import Session
from fedlora.text import human_bytes

LETTERS = "abcdefghijklmnopqrstuvwxyz"
COLOURS = (
    "#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5",
    "#9c6b4e", "#9498a0",
)  # fmt: skip


@dataclass(frozen=True)
class Division:
    """Who holds how many rows of what.

    Args:
        heading: what was divided, and how.
        column: the column that is counted; None: rows alone.
        values: its values, the most frequent first, the last perhaps "other".
        counts: for every client the number of rows of each value.
        names: what the clients are called, or "".
        ranks: their adapter ranks.
        evaluation: rows of the global evaluation of each value.
    """

    heading: str
    column: str | None
    values: list[str]
    counts: list[list[int]]
    names: list[str]
    ranks: list[int]
    evaluation: list[int]


def divide(config: Config, raw: RawData, ranks: list[int], by: str | None = None) -> Division:
    """Count who holds what.

    Args:
        config: of the run.
        raw: its rows.
        ranks: of the clients.
        by: the column to count; None: the one divided by, or a classifier's label.

    Raises:
        InputError: there is no such column.
    """
    found = holdings(config, raw, by)
    how: str = config.partition
    if any(raw.names) and config.partition == "iid":
        how = "one file per client"
    if config.partition in ("dirichlet", "quantity") and config.partition_shares is None:
        how += f" (alpha {config.partition_alpha:g})"
    if config.partition == "labels":
        how += f" ({config.partition_labels_per_client} per client)"
    heading = f"{raw.what}: {len(raw.train):,} rows, {len(raw.clients)} clients, {how}"
    if config.partition in ("dirichlet", "column", "labels"):
        heading += f" by {config.partition_column or config.label_column_name}"
    return Division(
        f"{heading}, seed {config.seed}",
        found.column,
        found.values,
        found.counts,
        found.names,
        ranks,
        found.evaluation,
    )


def show_partition(division: Division, console: Console) -> None:
    """A table of counts, and a bar per client in the terminal."""
    console.print(Text(division.heading, style="bold"))
    letters = LETTERS[: len(division.values)]
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("client", justify="right", no_wrap=True)
    if any(division.names):
        table.add_column("holds", overflow="ellipsis", no_wrap=True, max_width=24)
    for heading in ("rank", "rows", "share"):
        table.add_column(heading, justify="right", no_wrap=True)
    if division.column is not None:
        shown = [
            f"{letter} {_brief(x)}" for letter, x in zip(letters, division.values, strict=True)
        ]
        if sum(max(len(word) for word in x.split()) + 2 for x in shown) > console.width - 40:
            shown = list(letters)  # the legend below has the values
        for i, heading in enumerate(shown):
            longest = max(len(f"{n:,}") for n in (row[i] for row in _all_counts(division)))
            table.add_column(Text(heading), justify="right", overflow="fold", min_width=longest)
    total = sum(map(sum, division.counts))
    for client, counts in enumerate(division.counts):
        name = [Text(division.names[client])] if any(division.names) else []
        cells = [f"{n:,}" if n else "-" for n in counts] if division.column else []
        rows = sum(counts)
        table.add_row(
            str(client), *name, str(division.ranks[client]), f"{rows:,}", f"{rows / total:.1%}",
            *cells,
        )  # fmt: skip
    if division.evaluation:
        name = [Text("")] if any(division.names) else []
        cells = [f"{n:,}" if n else "-" for n in division.evaluation] if division.column else []
        table.add_row("eval", *name, "", f"{sum(division.evaluation):,}", "", *cells)
    least = Measurement.get(console, console.options.update(max_width=10_000), table).minimum
    if least > console.width:  # a line that goes on is better than a number cut off
        table.width = least
    console.print(table, crop=False)
    width = max(20, min(console.width, 100) - 14)
    most = max(map(sum, division.counts))
    for client, counts in enumerate(division.counts):
        line = Text(f"{client:>6} ")
        for i, size in enumerate(_cells(counts, width * sum(counts) / most)):
            line.append(letters[i] * size, style=f"black on {COLOURS[i % len(COLOURS)]}")
        line.append(f" {sum(counts):,}")
        console.print(line, no_wrap=True)
    if division.column is not None:
        legend = Text("\n       ")
        for i, value in enumerate(division.values):
            legend.append(f" {letters[i]} ", style=f"black on {COLOURS[i % len(COLOURS)]}")
            legend.append(f" {_brief(value)}  ")
        console.print(legend)


def _brief(value: str) -> str:
    value = " ".join(value.split())
    return value if len(value) <= 24 else value[:21] + "..."


def _all_counts(division: Division) -> list[list[int]]:
    return [*division.counts, *([division.evaluation] if division.evaluation else [])]


def _cells(counts: Sequence[int], width: float) -> list[int]:
    """Characters of a bar of this width for each count; rounded so that they add up to it."""
    total, ends, done = sum(counts), [], 0
    for count in counts:
        done += count
        ends.append(round(width * done / total) if total else 0)
    return [end - begin for begin, end in zip([0, *ends[:-1]], ends, strict=True)]


PICTURES = (".png", ".svg", ".pdf")


def check_picture(path: str) -> Path:
    """A file that a picture can be written to.

    Raises:
        InputError: another ending, or no such directory.
    """
    file = Path(path)
    if file.suffix not in PICTURES:
        raise InputError(f"--output {path}: a picture's name ends in {', '.join(PICTURES)}")
    if file.is_dir():
        raise InputError(f"--output {path}: is a directory")
    if not file.parent.is_dir():
        raise InputError(f"--output {path}: there is no directory {file.parent}")
    return file


def draw_partition(division: Division, path: Path) -> None:
    """The bars as a picture: PNG, SVG or PDF by the file's ending."""
    import warnings

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    clients = len(division.counts)
    figure, axes = pyplot.subplots(figsize=(8, max(2.5, 0.32 * clients + 1.2)))
    places, left, handles = list(range(clients)), [0] * clients, []
    for i in range(len(division.values)):
        sizes = [counts[i] for counts in division.counts]
        bars = axes.barh(places, sizes, left=left, color=COLOURS[i % len(COLOURS)], height=0.8)
        handles.append(bars)
        left = [x + y for x, y in zip(left, sizes, strict=True)]
    labels = [
        f"{k} {name}".strip() + f"  (r={rank})"
        for k, (name, rank) in enumerate(zip(division.names, division.ranks, strict=True))
    ]
    axes.set_yticks(places, labels)
    axes.invert_yaxis()
    axes.set_xlabel("rows")
    title = axes.set_title(division.heading, fontsize=9, loc="left")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    texts = []
    if division.column is not None:
        legend = axes.legend(
            handles, [_brief(value) for value in division.values], title=division.column,
            fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False,
        )  # fmt: skip
        texts = [*legend.get_texts(), legend.get_title()]
    for text in [*texts, *axes.get_yticklabels(), title]:
        text.set_parse_math(False)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing")
            figure.savefig(path, bbox_inches="tight", dpi=150)
    except OSError as error:
        raise InputError(f"--output {path}: cannot be written: {error.strerror}") from None
    finally:
        pyplot.close(figure)


# --- samples ---


def _say(console: Console, text: str) -> None:
    """A sentence as it is: no markup, no colours, no line ends that a file would keep."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def token_lengths(data: FederatedData) -> tuple[list[int], int]:
    """Tokens of every client's rows, ascending, and how many tokens a loss is taken on."""
    rows = [row for part in data.clients for row in (*part.train, *part.eval)]
    learnt = 0 if data.label_names else labelled(rows)
    return sorted(len(row["input_ids"]) for row in rows), learnt


def quantiles(lengths: list[int]) -> list[int]:
    """Least, median, 95% and most."""
    last = len(lengths) - 1
    return [lengths[min(last, int(q * len(lengths)))] for q in (0.0, 0.5, 0.95, 1.0)]


def first_samples(data: FederatedData, number: int) -> list[tuple[int, Tokens]]:
    """Every client's first row, every client's second ..., by client."""
    turns = zip_longest(*(part.train for part in data.clients))
    found = ((k, row) for turn in turns for k, row in enumerate(turn) if row is not None)
    return sorted(islice(found, number), key=lambda pair: pair[0])


def show_samples(
    data: FederatedData, tokenizer: Any, config: Config, number: int, console: Console
) -> None:
    """Lengths and losses of the whole data set, and its first samples token by token."""
    lengths, learnt = token_lengths(data)
    tokens = sum(lengths)
    _say(
        console,
        f"template {data.template}: {len(lengths):,} rows of {len(data.clients)} clients, "
        f"{len(data.eval):,} to evaluate on",
    )
    at = quantiles(lengths)
    cut = sum(length == config.max_length for length in lengths)
    _say(
        console,
        f"tokens of a row: least {at[0]}, median {at[1]}, 95% {at[2]}, most {at[3]}; {cut:,} "
        f"reach max_length {config.max_length}",
    )
    if not data.label_names:
        _say(console, f"a loss is taken on {learnt / tokens:.1%} of {tokens:,} tokens")
    for why, count in data.dropped.items():
        _say(console, dropped_line(count, why))
    for line in (*data.taken, *data.notes):
        _say(console, line)
    if not data.label_names:
        console.print(Text("\n[learnt] tokens stand in brackets, the others are context"))
    console.print()
    for client, row in first_samples(data, number):
        _show_row(row, f"client {client}", data, tokenizer, console)


def _show_row(
    row: Tokens, whose: str, data: FederatedData, tokenizer: Any, console: Console
) -> None:
    length = len(row["input_ids"])
    if data.label_names:
        label = data.label_names[row["label"]]
        console.print(Text(f"{whose}, {length} tokens, label {label}", style="bold"))
        console.print(Text(tokenizer.decode(row["input_ids"])))
    else:
        learnt = [label != IGNORE for label in row["labels"]]
        console.print(Text(f"{whose}, {length} tokens, {sum(learnt)} learnt", style="bold"))
        console.print(tokens_text(row["input_ids"], learnt, tokenizer))
    console.print()


def tokens_text(ids: Sequence[int], learnt: Sequence[bool], tokenizer: Any) -> Text:
    """Tokens as text, learnt ones green and in brackets, so that it reads without colours too."""
    out = Text()
    for i, (piece, learn) in enumerate(token_pieces(ids, learnt, tokenizer)):
        shown = piece.replace("\n", "\\n\n")
        if learn:
            out.append(f"[{shown}]", style="bold green")
        else:
            out.append(shown, style="dim" if i % 2 else "")
    return out


def token_pieces(
    ids: Sequence[int], learnt: Sequence[bool], tokenizer: Any
) -> Iterator[tuple[str, bool]]:
    """The text of one token, or of several that make a character, and whether it is learnt."""
    pending = list[int]()
    for i, (token, learn) in enumerate(zip(ids, learnt, strict=True)):
        pending.append(token)
        piece = _piece(tokenizer, pending)
        if piece.endswith("\ufffd") and len(pending) < 4 and i + 1 < len(ids):
            continue  # a part of a character; it is whole with the tokens that follow
        pending = []
        yield piece, learn


def _piece(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of tokens as it stands within a text: with the space before a word."""
    tokens = tokenizer.convert_ids_to_tokens(list(ids))
    text = str(tokenizer.decode(list(ids), skip_special_tokens=False))
    if tokens and str(tokens[0]).startswith("\u2581") and not text.startswith(" "):
        text = " " + text  # SentencePiece drops the space of a first word
    return text


# --- what a run would do ---


@dataclass(frozen=True)
class ClientPlan:
    """What a client would do in a round.

    Args:
        client: its number.
        rank: of its adapter.
        scale: of the adapter, `alpha / r` or `alpha / sqrt(r)`.
        rows, tokens: to train on.
        steps: of a round.
        parameters: trained, and sent as float32.
    """

    client: int
    rank: int
    scale: float
    rows: int
    tokens: int
    steps: int
    parameters: int

    @property
    def bytes_up(self) -> int:
        """Of a round, to the server."""
        return 4 * self.parameters


def client_plans(session: Session) -> list[ClientPlan]:
    """What every client would do, from the shapes of the model and the tokenised data."""
    spec, plans = session.federation, []
    dense = sum(p.numel() for p in session.base.dense.values())
    for client, part in enumerate(session.data.clients):
        own, rank = session.config.of_client(client), spec.ranks[client]
        asked = spec.trained_by(client)
        shapes = [s for n, s in spec.shapes.items() if asked is None or n in asked]
        plans.append(
            ClientPlan(
                client,
                rank,
                scaling(own.alpha(rank), rank, own.use_rslora),
                len(part.train),
                sum(len(row["input_ids"]) for row in part.train),
                budget_of(own).steps(len(part.train)) if part.train else 0,
                sum(rank * (m + n) for m, n in shapes) + dense,
            )
        )
    return plans


def show_plan(session: Session, console: Console) -> None:
    """What a run would do, from the shapes of the model and the tokenised data."""
    config, base, data, spec = session.config, session.base, session.data, session.federation
    parameters = sum(p.numel() for p in base.model.parameters())
    dense = sum(p.numel() for p in base.dense.values())
    _say(
        console,
        f"{config.model_name_or_path}: {type(base.model).__name__}, {_count(parameters)} "
        f"parameters ({config.dtype})\n{len(spec.shapes)} target modules: "
        + ", ".join(base.targets.names[:8])
        + (" ..." if len(base.targets.names) > 8 else ""),
    )
    if dense:
        names = ", ".join(base.targets.modules_to_save)
        _say(console, f"trained whole: {names} ({_count(dense)} parameters)")
    for warning in session.warnings:
        console.print(Text(f"warning: {warning}", style="yellow"))
    budget = budget_of(config)
    _say(
        console,
        f"method {config.method}, {config.num_rounds} rounds, {len(spec.sample(1))} of "
        f"{len(spec.ranks)} clients in each; batches of {budget.per_device_train_batch_size} x "
        f"{budget.gradient_accumulation_steps}, learning rate {config.learning_rate:g}",
    )
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("client", "rank", "scale", "rows", "tokens", "steps a round", "trained", "up"):
        table.add_column(name, justify="right")
    for plan in client_plans(session):
        table.add_row(
            str(plan.client),
            str(plan.rank),
            f"{plan.scale:g}",
            f"{plan.rows:,}",
            f"{plan.tokens:,}",
            f"{plan.steps:,}" if plan.rows else "-",
            _count(plan.parameters),
            human_bytes(plan.bytes_up),
        )
    console.print(table)
    assert not isinstance(config.client_overrides, str)
    for client, values in sorted((config.client_overrides or {}).items()):
        settings = ", ".join(f"{key} {value}" for key, value in values.items())
        _say(console, f"client {client} by itself: {settings}")
    _say(
        console,
        f"{len(data.eval):,} rows to evaluate on; template {data.template}. Everything fits "
        "together; no weights were read and nothing was written.",
    )


def _count(number: float) -> str:
    for unit in ("", " K", " M", " B"):
        if number < 1000 or unit == " B":
            return f"{number:.0f}{unit}" if unit in ("", " K") else f"{number:.1f}{unit}"
        number /= 1000
    raise AssertionError


# --- what was combined ---


def show_layers(result: Aggregated, names: Sequence[str], console: Console) -> None:
    """A line per adapter with its weight, and a table of ranks and errors by layer."""
    for i, (name, weight) in enumerate(zip(names, result.weights, strict=True), 1):
        _say(console, f"{i}  weight {weight:.4f}  {name}")
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("layer", overflow="fold")
    for i in range(1, len(names) + 1):
        table.add_column(f"r {i}", justify="right", no_wrap=True)
    table.add_column("rank", justify="right", no_wrap=True)
    table.add_column("rel. error", justify="right", no_wrap=True)
    for name, layer in result.layers.items():
        ranks = ["-" if rank is None else str(rank) for rank in layer.ranks]
        table.add_row(Text(name), *ranks, str(layer.rank), f"{layer.error:.1e}")
    console.print(table)
    if result.dense:
        known = (
            f"their rows are matched by the labels {', '.join(result.labels)}"
            if result.labels
            else "whether their rows stand for the same labels is not written in an adapter"
        )
        _say(console, f"saved whole and averaged: {', '.join(result.dense)} ({known})")
    if result.base:
        _say(console, f"weights of the base carried along: {', '.join(result.base)}")
    for note in result.notes:
        console.print(Text(f"warning: {note}", style="yellow"))
