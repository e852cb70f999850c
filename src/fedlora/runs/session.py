"""Makes everything a run needs from its configuration: model, data, ranks, settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch

from fedlora import threads
from fedlora.adapters.peft_files import CONFIG_NAME
from fedlora.client.evaluate import has_prompts, references_fit
from fedlora.client.memory import automatic_size, largest_need, memory_available
from fedlora.config.clients import (
    check_overrides,
    client_modules,
    client_ranks,
    settled_overrides,
    with_overrides_read,
)
from fedlora.config.config import EVALUATED, Config
from fedlora.config.keys import Mark, keys_marked
from fedlora.data.datasets import FederatedData, load_data
from fedlora.data.general_text import windows
from fedlora.data.label_counts import LabelCounts, label_counts
from fedlora.data.raw_data import RawData, load_rows
from fedlora.data.reading import find_labels, is_classification, template_of
from fedlora.data.subsets import subsets
from fedlora.data.templates import BUILT_IN_CHAT
from fedlora.data.tokenize import Tokens
from fedlora.embedded import BASE_DIR, EMBEDDED
from fedlora.errors import InputError
from fedlora.federation.checks import check_rule, check_server_step
from fedlora.federation.exchange import Agreement
from fedlora.federation.participants import Federation
from fedlora.federation.server import initial_state
from fedlora.lowrank import LowRank
from fedlora.methods import METHODS
from fedlora.methods.values import ServerState
from fedlora.model.acceleration import accelerate
from fedlora.model.base import BaseModel
from fedlora.model.dtype import resolve_dtype
from fedlora.model.loading import load_model
from fedlora.model.passes import runner_of
from fedlora.model.sources import Source, check_place, find_source, label_order, load_tokenizer
from fedlora.runs.starting import from_adapter, init_notes
from fedlora.runs.trackers import check_trackers

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

    @property
    def fingerprints(self) -> dict[str, str]:
        """Of the base weights and of all tokens, to recognise others on resume."""
        return {"base": self.base.fingerprint, "data": self.data.fingerprint}


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
    return is_classification(config) or (source.classifier and config.template == "auto")


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
    names: tuple[str, ...] = ()
    if classify:
        found = find_labels(config, raw, template_of(config, raw, True))
        names = tuple(found) if config.label_names else label_order(source, found)
    data = load_data(
        config,
        tokenizer,
        raw,
        classify=classify,
        label_names=names,
    )
    return source, tokenizer, data


def assemble(config: Config, *, weights: bool = True) -> Session:
    """Load and check everything; nothing is written.

    Args:
        config: of the run.
        weights: False checks all the same, with a model of shapes alone.

    Raises:
        InputError: what cannot be used, and what to do.
    """
    config = written = resolve_paths(config)
    open_threads = config.num_threads is None
    num_threads, crowded, busy = _threads(config, weights)
    torch.set_num_threads(num_threads)
    check_trackers(config)
    if config.init_adapter:
        check_place("init_adapter", config.init_adapter, holds=CONFIG_NAME)
    raw = load_rows(config)
    source, tokenizer, data = tokenized(config, raw)
    config, choices = _with_dtype(config, source)
    choices = [*crowded, *choices, *data.taken]
    number = len(data.clients)
    ranks = client_ranks(config, number)
    check_rule(METHODS[config.method], ranks)
    check_server_step(METHODS[config.method], config.server_learning_rate, config.server_momentum)
    if METHODS[config.method].training(config.rule_options()).keeps and (
        config.load_best_model_at_end
    ):
        raise InputError(
            f"load_best_model_at_end: method {config.method} makes a model for every client, and "
            "only the last round's are kept; leave it out"
        )
    if isinstance(config.clients_per_round, int) and config.clients_per_round > number:
        raise InputError(
            f"clients_per_round: {config.clients_per_round}, but there are {number} clients"
        )
    task = "SEQ_CLS" if data.label_names else "CAUSAL_LM"
    base, notes = load_model(source, tokenizer, config, data.label_names, weights=weights)
    accelerate(base.model, config)
    modules = client_modules(config, base.targets.shapes)
    warnings = [*busy, *notes, *_data_warnings(data), *init_notes(config)]
    held_out = [*data.eval, *(row for part in data.clients for row in part.eval)]
    longest, context = _fits(config, base, data)
    exact_match = config.eval_exact_match if task == "CAUSAL_LM" else False
    if exact_match == "auto":
        fits = longest + config.generation_max_new_tokens <= context
        exact_match = fits and references_fit(data.eval, config.generation_max_new_tokens)
    elif exact_match and not has_prompts(held_out):
        raise InputError(
            "eval_exact_match: true, but there are rows without a prompt to answer; it needs "
            "completion_only_loss: true and a template other than text"
        )
    _check_metric(config, data, task, exact_match)
    agreement = Agreement(
        METHODS[config.method], config.rule_options(), base.targets.shapes, config.seed
    )
    federation = Federation(
        ranks=ranks,
        num_examples=[len(part.train) for part in data.clients],
        agreement=agreement,
        clients_per_round=config.clients_per_round,
        client_weights=config.client_weights,
        server_learning_rate=config.server_learning_rate,
        server_momentum=config.server_momentum,
        modules=modules,
    )
    resolved = settled_overrides(config, ranks).model_copy(
        update={
            "num_threads": num_threads,
            "use_cpu": base.device.type != "cuda",
            "num_clients": number,
            "template": data.template,
            "lora_task_type": task,
            "label_names": list(data.label_names) or None,
            "dtype": str(_frozen_dtype(base)).removeprefix("torch."),
            "cohort_size": _cohort_size(config, base, data, federation) if weights else "auto",
            "eval_exact_match": exact_match,
            "greater_is_better": config.metric_is_better_when_greater,
        }
    )
    if config.cohort_size == "auto" and weights:
        choices.append(f"clients in one pass: {resolved.cohort_size}")
    return Session(
        resolved,
        base,
        data,
        federation,
        tuple(warnings),
        tuple(choices),
        label_counts(resolved, _limited(config, raw)),
        _general(config, tokenizer, min(context, config.max_length), task),
        {k: x for k in SETTLED if (x := getattr(written, k)) != getattr(resolved, k)},
        own_threads=open_threads,
    )


def alone(session: Session, client: int, output_dir: Path) -> Session:
    """The session of one client that trains by itself: same rows, steps and rank, nobody to ask.

    Raises:
        InputError: it has no row to train on.
    """
    data, spec = session.data, session.federation
    if not data.clients[client].train:
        raise InputError(f"client {client} has no rows to train on by itself")
    rank, overrides = spec.ranks[client], session.config.client_overrides
    assert not isinstance(overrides, str)
    own = (overrides or {}).get(client)
    config = session.config.model_copy(
        update={
            "method": "fedit",  # with one client: go on training the same adapter
            "method_options": {},
            "num_clients": 1,
            "client_ranks": [rank],
            "client_overrides": {0: own} if own else None,
            "output_dir": str(output_dir),
            "save_total_limit": 2,
        }
    )
    return replace(
        session,
        config=config,
        data=replace(data, clients=(data.clients[client],)),
        label_counts=session.label_counts.of(client) if session.label_counts else None,
        federation=replace(
            spec,
            agreement=replace(
                spec.agreement, rule=METHODS[config.method], options=config.rule_options()
            ),
            ranks=[rank],
            num_examples=[spec.num_examples[client]],
            modules={0: spec.modules[client]} if client in spec.modules else {},
        ),
        lone=client,
    )


def _limited(config: Config, raw: RawData) -> RawData:
    """The rows that are taken of every client."""
    taken = subsets(config, [len(rows) for rows in raw.clients], len(raw.eval)).clients
    clients = [[rows[i] for i in of] for rows, of in zip(raw.clients, taken, strict=True)]
    return replace(raw, clients=clients)


def _general(config: Config, tokenizer: Any, length: int, task: str) -> Sequence[Tokens]:
    if config.general_file is None:
        return ()
    if task == "SEQ_CLS":
        raise InputError("general_file: a classifier has no loss on text; leave it out")
    return windows(tokenizer, config.general_file, length, config.max_eval_samples)


def _threads(config: Config, weights: bool) -> tuple[int, list[str], list[str]]:
    """How many threads torch gets, what was chosen, and what to warn of, in words.

    Where the number is left open, no more than there are free cores (`fedlora.threads`).
    """
    number = config.num_threads or torch.get_num_threads()
    cuda = torch.cuda.is_available() and not config.use_cpu
    room = threads.look() if weights and number > 1 and not cuda else None
    if room is None or (fit := room.threads(number)) == number:
        return number, [], []
    if config.num_threads:
        return number, [], [threads.unchanged(number, fit, room)]
    return fit, [threads.fewer(number, fit, room)], []


def _with_dtype(config: Config, source: Source) -> tuple[Config, list[str]]:
    """The configuration with the base's dtype settled, and why it is that."""
    if config.dtype != "auto":
        return config, []
    cuda = torch.cuda.is_available() and not config.use_cpu
    dtype, why = resolve_dtype(source.config, torch.device("cuda" if cuda else "cpu"))
    name = str(dtype).removeprefix("torch.")
    return config.model_copy(update={"dtype": name}), [f"base in {name}: {why}"]


def _cohort_size(
    config: Config, base: BaseModel, data: FederatedData, federation: Federation
) -> int:
    """How many clients train in one pass: as configured, or as is found out."""
    passes = runner_of(base.model)  # what cannot be trained is refused here, before any round
    if config.cohort_size != "auto":
        return config.cohort_size
    if not passes.joint or base.tied:
        return 1
    sizes = [config.of_client(k).per_device_train_batch_size for k in range(len(federation.ranks))]
    rows = [part.train for part in data.clients]
    need = largest_need(base, list(zip(rows, sizes, federation.ranks, strict=True)), config.seed)
    budget = (
        int(config.cohort_memory * 2**30)
        if config.cohort_memory
        else memory_available(base.device) // 2
    )
    return automatic_size(need, len(federation.sample(1)), budget, base.device)


def _frozen_dtype(base: BaseModel) -> torch.dtype:
    frozen = (p for name, p in base.model.named_parameters() if name not in base.full_params)
    return cast(torch.dtype, next(frozen).dtype)


def dropped_line(number: int, why: str) -> str:
    """How many rows are left out and why."""
    return f"{number:,} {'row is' if number == 1 else 'rows are'} dropped: {why}"


def _data_warnings(data: FederatedData) -> list[str]:
    out = [dropped_line(number, why) for why, number in data.dropped.items()]
    out += data.notes
    if data.label_names:
        learnt = {row["label"] for part in data.clients for row in part.train}
        unseen = [name for i, name in enumerate(data.label_names) if i not in learnt]
        if unseen:
            out.append(f"no client has a row of the label {', '.join(unseen)}")
    return out


def _fits(config: Config, base: BaseModel, data: FederatedData) -> tuple[int, int]:
    """The longest row and the model's context, in tokens."""
    rows = [*data.eval, *(row for part in data.clients for row in (*part.train, *part.eval))]
    longest = max(len(row["input_ids"]) for row in rows)
    text = base.model.config.get_text_config()
    context = getattr(text, "max_position_embeddings", None) or longest
    if context < 0:  # positions that are relative, without an end (XLNet)
        context = longest
    if getattr(text, "model_type", "") in _OFFSET_POSITIONS:
        context -= (text.pad_token_id or 0) + 1
    if longest > context:
        raise InputError(
            f"max_length: {config.max_length}: a row has {longest} tokens, the model's context "
            f"{context}; use max_length {context} or less"
        )
    return longest, context


_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert", "roberta-prelayernorm", "xmod")
"""Architectures that count positions from the padding token's id on."""


def _check_metric(config: Config, data: FederatedData, task: str, exact_match: bool) -> None:
    name = config.metric_for_best_model.removeprefix("eval_")
    known = [k for k in EVALUATED[task] if k != "exact_match" or exact_match]
    if name not in known:
        raise InputError(
            f"metric_for_best_model: {config.metric_for_best_model!r} is not measured; there are "
            + ", ".join(f"eval_{k}" for k in known)
        )
    if config.eval_personal and not data.eval:
        raise InputError(
            "eval_personal needs something to evaluate on: give eval_file, dataset_test_split or "
            "client_eval_fraction"
        )
    if not data.eval and (config.load_best_model_at_end or config.early_stopping_patience):
        key = (
            "load_best_model_at_end" if config.load_best_model_at_end else "early_stopping_patience"
        )
        raise InputError(
            f"{key} needs something to evaluate on: give eval_file, dataset_test_split or "
            "client_eval_fraction"
        )


def starting_state(session: Session) -> ServerState:
    """The server's state before round 1.

    Raises:
        InputError: `init_adapter` cannot be read, or changes what is no target module.
    """
    given: Mapping[str, LowRank] = {}
    dense, source = session.base.read_full_params(), session.config.init_adapter
    if source:
        shapes, names = session.federation.shapes, session.data.label_names
        given, dense = from_adapter(source, session.base.model, shapes, dense, names)
    return initial_state(session.federation, given, dense)


def resolve_paths(config: Config) -> Config:
    """The configuration with absolute paths, which a resumed run finds from any directory, and
    with the settings of single clients read from their files."""
    config = with_overrides_read(config)
    paths = keys_marked(Config, Mark.ABSOLUTE)
    return config.model_copy(update={key: _absolute(getattr(config, key)) for key in paths})


def _absolute(name: str | None) -> str | None:
    """An absolute path; a hub name stays as it is."""
    if name is None or name == EMBEDDED or name in BUILT_IN_CHAT:
        return name
    path = Path(name)
    pattern = bool(set(name) & set("*?["))
    exists = path.exists() or (
        path.parent.is_dir() and (pattern or (len(path.parts) > 1 and path.suffix))
    )
    return str(path.resolve()) if exists else name
