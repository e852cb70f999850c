"""Makes everything a run in one process needs from its configuration: model, data, ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from fedlora.adapters.peft_files import CONFIG_NAME
from fedlora.config.clients import (
    check_overrides,
    client_modules,
    client_ranks,
    settled_overrides,
)
from fedlora.config.config import Config
from fedlora.config.keys import Mark, keys_marked
from fedlora.data.datasets import ClientData, FederatedData, load_data
from fedlora.data.general_text import windows
from fedlora.data.label_counts import LabelCounts, label_counts
from fedlora.data.raw_data import RawData, load_rows
from fedlora.data.reading import find_labels, is_classification, template_of
from fedlora.data.subsets import draw_subsets
from fedlora.data.tokenize import Tokens
from fedlora.embedded import BASE_DIR, EMBEDDED
from fedlora.errors import InputError
from fedlora.federation.exchange import Agreement
from fedlora.federation.participants import Federation
from fedlora.federation.server import initial_state
from fedlora.lowrank import LowRank
from fedlora.methods import METHODS
from fedlora.methods.values import ServerState
from fedlora.model.acceleration import accelerate
from fedlora.model.base import BaseModel
from fedlora.model.loading import load_model
from fedlora.model.sources import Source, check_place, find_source, label_order, load_tokenizer
from fedlora.runs.absolute_paths import resolve_paths
from fedlora.runs.automatic import (
    choose_cohort_size,
    choose_exact_match,
    choose_num_workers,
    choose_threads,
    frozen_dtype,
    with_dtype,
)
from fedlora.runs.checks import (
    check_evaluation,
    check_method,
    check_metric,
    check_quorum,
    data_warnings,
)
from fedlora.runs.events import HeaderClient
from fedlora.runs.measured_choice import choose_by_time, with_way
from fedlora.runs.planning.client_needs import with_ranks_that_fit
from fedlora.runs.precisions import load_other_bases
from fedlora.runs.run_session import RunSession
from fedlora.runs.starting import from_adapter, init_notes
from fedlora.runs.tracker_checks import check_trackers

SETTLED = keys_marked(Config, Mark.AUTOMATIC, Mark.REWRITTEN)
"""Keys that a resolved configuration may hold otherwise than the user wrote them."""


@dataclass(frozen=True)
class Session:
    """A run's ingredients.

    Args:
        config: resolved: every automatic choice is made and written in it.
        base: the frozen base with adapter layers.
        data: all clients' data.
        federation: who takes part.
        warnings: what the user should know before it starts.
        choices: what was decided for this machine, in words.
        label_counts: who holds what.
        general: windows of general text, whose loss shows what is forgotten.
        asked: of the keys in `SETTLED` that `config` holds otherwise, what the user wrote.
        lone: the client that trains by itself, see `alone`; None: a federation.
        own_threads: the number of threads was left open, so that the run may lower it.
        other_bases: client number -> its base, of those that hold it in another precision.
    """

    config: Config
    base: BaseModel
    data: FederatedData
    federation: Federation
    warnings: tuple[str, ...]
    choices: tuple[str, ...] = ()
    label_counts: LabelCounts | None = None
    general: Sequence[Tokens] = ()
    asked: Mapping[str, Any] = field(default_factory=dict)
    lone: int | None = None
    own_threads: bool = False
    other_bases: Mapping[int, BaseModel] = field(default_factory=dict)

    @property
    def fingerprints(self) -> dict[str, str]:
        """Of the base weights and of all tokens, to recognise others on resume."""
        return {"base": self.base.fingerprint, "data": self.data.fingerprint}

    @property
    def label_names(self) -> tuple[str, ...]:
        """A classifier's labels in the order of their ids; empty: a causal model."""
        return self.data.label_names

    @property
    def first_values(self) -> Mapping[str, Tensor]:
        """The parameters trained whole, as the base has them before round 1."""
        return self.base.read_full_params()

    @property
    def column(self) -> str | None:
        """The column whose values `label_counts` counts; None where no column is known."""
        return self.label_counts.column if self.label_counts else None

    @property
    def clients(self) -> list[HeaderClient]:
        """What the log says of every client."""
        return [self._client(client, part) for client, part in enumerate(self.data.clients)]

    def _client(self, client: int, part: ClientData) -> HeaderClient:
        held = self.label_counts
        counts = dict(zip(held.values, held.counts[client], strict=True)) if held else {}
        return HeaderClient(
            client=client,
            name=held.names[client] if held else "",
            rank=self.federation.ranks[client],
            rows=len(part.train),
            eval_rows=len(part.eval),
            tokens=sum(len(row["input_ids"]) for row in part.train),
            counts={value: count for value, count in counts.items() if count},
        )

    @property
    def run(self) -> str:
        """Nobody but this process knows the run."""
        return ""


def model_source(config: Config) -> Source:
    """Where the base model comes from; none of its weights are read.

    Raises:
        InputError: none is named, or it cannot be found.
    """
    if not config.model_name_or_path:
        raise InputError(
            "model_name_or_path: name the base model, a hub name or a directory (embedded: the "
            "tiny model of this package)"
        )
    embedded = config.model_name_or_path == EMBEDDED
    return find_source(
        str(BASE_DIR) if embedded else config.model_name_or_path,
        config.model_revision,
        config.trust_remote_code,
    )


def classifies(config: Config, source: Source) -> bool:
    """Whether a classifier is trained: the data, the settings or the checkpoint say so."""
    if config.lora_task_type != "auto":
        return config.lora_task_type == "SEQ_CLS"
    return is_classification(config.lora_task_type, config.label_column_name, config.template) or (
        source.classifier and config.template == "auto"
    )


def tokenized(config: Config, raw: RawData | None = None) -> tuple[Source, Any, FederatedData]:
    """The data as the model will read it, without its weights.

    Args:
        config: with absolute paths (`resolve_paths`).
        raw: its rows, where they were read already.

    Raises:
        InputError: data, tokenizer or model cannot be used, and what to do.
    """
    source = model_source(config)
    raw = raw or load_rows(config)
    check_overrides(config, len(raw.clients))
    classify = classifies(config, source)
    tokenizer = load_tokenizer(
        source, config.tokenizer_name, config.chat_template_path, generates=not classify
    )
    label_names: tuple[str, ...] = ()
    if classify:
        labels = find_labels(raw, template_of(config, raw, True), config.label_names)
        label_names = tuple(labels) if config.label_names else label_order(source, labels)
    data = load_data(config, tokenizer, raw, classify=classify, label_names=label_names)
    return source, tokenizer, data


def assemble(config: Config, *, weights: bool = True, measure: bool = False) -> Session:
    """Load and check everything a run in one process needs; nothing is written.

    Args:
        config: of the run.
        weights: False checks all the same, with a model of shapes alone.
        measure: whether a long run may time training steps to decide how it trains.

    Raises:
        InputError: what cannot be used, and what to do.
    """
    config = asked = resolve_paths(config)
    threads = choose_threads(config, look=weights)
    torch.set_num_threads(threads.number)
    check_trackers(config)
    check_init_adapter(config)
    raw = load_rows(config)
    source, tokenizer, data = tokenized(config, raw)
    way, why_way = None, list[str]()
    if weights and measure:
        way, why_way = choose_by_time(config, source, tokenizer, data, threads.number)
        config, threads = with_way(config, way), threads.of_way(way)
        torch.set_num_threads(threads.number)
    config, why_dtype = with_dtype(config, source)
    config, why_ranks = with_ranks_that_fit(config, source, tokenizer, data)
    ranks = client_ranks(config, len(data.clients))
    check_method(config, ranks)
    load = partial(load_base, source, tokenizer, label_names=data.label_names, weights=weights)
    base, notes = load(config)
    others, held = load_other_bases(config, lambda own: load(own)[0])
    federation = make_federation(config, base, ranks, [len(part.train) for part in data.clients])
    task = task_of(data.label_names)
    exact_match, context = choose_exact_match(config, base, data, task)
    check_metric(config, task, exact_match=exact_match)
    check_evaluation(config, data)
    check_quorum(config, len(federation.sample(1)))
    num_workers = choose_num_workers(config, base, federation)
    cohort_size: int | Literal["auto"] = "auto"
    if weights:
        most = way.clients if way else None
        cohort_size = choose_cohort_size(config, base, data, federation, num_workers, most)
    choices = [*threads.choices, *why_way, *why_dtype, *why_ranks, *held, *data.taken]
    if config.num_workers == "auto" and num_workers:
        choices.append(f"worker processes: {num_workers}")
    if config.cohort_size == "auto" and weights:
        choices.append(f"clients in one pass: {cohort_size}")
    resolved = settled_overrides(config, ranks).model_copy(
        update={
            "num_threads": threads.number,
            "use_cpu": base.device.type != "cuda",
            "num_clients": len(ranks),
            "template": data.template,
            "lora_task_type": task,
            "label_names": list(data.label_names) or None,
            "dtype": frozen_dtype(base),
            "cohort_size": cohort_size,
            "num_workers": num_workers or "auto",
            "eval_exact_match": exact_match,
            "greater_is_better": config.metric_is_better_when_greater,
        }
    )
    return Session(
        config=resolved,
        base=base,
        data=data,
        federation=federation,
        warnings=(*threads.warnings, *notes, *data_warnings(data), *init_notes(config)),
        choices=tuple(choices),
        label_counts=label_counts(resolved, _limited(config, raw)),
        general=general_rows(config, tokenizer, min(context, config.max_length), task),
        asked={k: x for k in SETTLED if (x := getattr(asked, k)) != getattr(resolved, k)},
        own_threads=asked.num_threads is None,
        other_bases=others,
    )


def check_init_adapter(config: Config) -> None:
    """Refuse an `init_adapter` that is no PEFT directory.

    Raises:
        InputError: what was found in its place.
    """
    if config.init_adapter:
        check_place("init_adapter", config.init_adapter, holds=CONFIG_NAME)


def task_of(label_names: Sequence[str]) -> str:
    """PEFT's name of the task: a classifier has labels, a causal model has none."""
    return "SEQ_CLS" if label_names else "CAUSAL_LM"


def load_base(
    source: Source,
    tokenizer: Any,
    config: Config,
    label_names: Sequence[str],
    *,
    weights: bool = True,
) -> tuple[BaseModel, list[str]]:
    """The base with adapter layers and faster kernels, and what the user should know of it."""
    base, notes = load_model(source, tokenizer, config, label_names, weights=weights)
    accelerate(
        base.model,
        gradient_checkpointing=config.gradient_checkpointing,
        torch_compile=config.torch_compile,
        use_liger_kernel=config.use_liger_kernel,
    )
    return base, notes


def make_agreement(config: Config, base: BaseModel) -> Agreement:
    """What the server and every site hold to: the rule, its options, the shapes and the seed."""
    rule, options = METHODS[config.method], config.rule_options()
    return Agreement(rule, options, base.targets.shapes, config.seed, config.compression)


def make_federation(
    config: Config, base: BaseModel, ranks: Sequence[int], num_examples: Sequence[int]
) -> Federation:
    """Who takes part, and what all of them agree on: the base's shapes and the seed."""
    return Federation(
        ranks=ranks,
        num_examples=num_examples,
        agreement=make_agreement(config, base),
        clients_per_round=config.clients_per_round,
        client_weights=config.client_weights,
        server_learning_rate=config.server_learning_rate,
        server_momentum=config.server_momentum,
        modules=client_modules(config, base.targets.shapes),
        compression_feedback=config.compression_feedback,
    )


def _limited(config: Config, raw: RawData) -> RawData:
    """The rows that are taken of every client."""
    taken = draw_subsets(config, [len(rows) for rows in raw.clients], len(raw.eval)).clients
    clients = [[rows[i] for i in of] for rows, of in zip(raw.clients, taken, strict=True)]
    return replace(raw, clients=clients)


def general_rows(config: Config, tokenizer: Any, length: int, task: str) -> Sequence[Tokens]:
    """Windows of `general_file`, of at most so many tokens; none where no file is named.

    Raises:
        InputError: it cannot be read, or the task has no loss on text.
    """
    if config.general_file is None:
        return ()
    if task == "SEQ_CLS":
        raise InputError("general_file: a classifier has no loss on text; leave it out")
    return windows(tokenizer, config.general_file, length, config.max_eval_samples)


def starting_state(session: RunSession) -> ServerState:
    """The server's state before round 1.

    Raises:
        InputError: `init_adapter` cannot be read, or changes what is no target module.
    """
    adapter: Mapping[str, LowRank] = {}
    dense, source = session.first_values, session.config.init_adapter
    if source:
        shapes, names = session.federation.shapes, session.label_names
        adapter, dense = from_adapter(source, session.base.model, shapes, dense, names)
    return initial_state(session.federation, adapter, dense)
