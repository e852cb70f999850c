"""Checks a configuration against the model and the data it is to be run with."""

from __future__ import annotations

from collections.abc import Sequence

from fedlora.client.evaluate import has_prompts
from fedlora.config.config import Config
from fedlora.config.keys import EVALUATED
from fedlora.data.datasets import FederatedData
from fedlora.errors import InputError
from fedlora.federation.checks import check_rule, check_server_step
from fedlora.methods import METHODS
from fedlora.model.base import BaseModel

_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert", "roberta-prelayernorm", "xmod")
"""Architectures that count positions from the padding token's id on."""

GIVE_ROWS = (
    "needs something to evaluate on: give eval_file, dataset_test_split or client_eval_fraction"
)


def check_method(config: Config, ranks: Sequence[int]) -> None:
    """Refuse what the aggregation rule cannot do with these clients.

    Args:
        config: of the run.
        ranks: the adapter rank of every client.

    Raises:
        InputError: mixed ranks, a server optimiser, a choice of the best round or a number of
            clients per round that does not go with the method or its clients.
    """
    rule = METHODS[config.method]
    check_rule(rule, ranks)
    check_server_step(rule, config.server_learning_rate, config.server_momentum)
    if rule.training(config.rule_options()).keeps and config.load_best_model_at_end:
        raise InputError(
            f"load_best_model_at_end: method {config.method} makes a model for every client, and "
            "only the last round's are kept; leave it out"
        )
    per_round = config.clients_per_round
    if isinstance(per_round, int) and per_round > len(ranks):
        raise InputError(f"clients_per_round: {per_round}, but there are {len(ranks)} clients")


def check_context(config: Config, base: BaseModel, data: FederatedData) -> tuple[int, int]:
    """Refuse rows that are longer than the model's context.

    Returns:
        The longest row and the context, in tokens. Where the model has no limit, the context is
        the longest row.

    Raises:
        InputError: a row is too long; how long it may be.
    """
    rows = [*data.eval, *(row for part in data.clients for row in (*part.train, *part.eval))]
    longest = max(len(row["input_ids"]) for row in rows)
    context = _context(base) or longest
    if longest > context:
        raise InputError(
            f"max_length: {config.max_length}: a row has {longest} tokens, the model's context "
            f"{context}; use max_length {context} or less"
        )
    return longest, context


def _context(base: BaseModel) -> int | None:
    """How many tokens the model's positions reach; None where they have no end."""
    text = base.model.config.get_text_config()
    positions: int = getattr(text, "max_position_embeddings", None) or 0
    if positions <= 0:  # not declared, or relative positions (XLNet says -1)
        return None
    if getattr(text, "model_type", "") in _OFFSET_POSITIONS:
        positions -= (text.pad_token_id or 0) + 1
    return positions


def check_prompts(data: FederatedData) -> None:
    """Refuse to look for exact answers where no row asks anything.

    Raises:
        InputError: some rows have no prompt.
    """
    held_out = [*data.eval, *(row for part in data.clients for row in part.eval)]
    if not has_prompts(held_out):
        raise InputError(
            "eval_exact_match: true, but there are rows without a prompt to answer; it needs "
            "completion_only_loss: true and a template other than text"
        )


def check_metric(config: Config, task: str, *, exact_match: bool) -> None:
    """Refuse to choose the best round by what is not measured.

    Raises:
        InputError: the metric is none of those that there are.
    """
    name = config.metric_for_best_model.removeprefix("eval_")
    measured = [k for k in EVALUATED[task] if k != "exact_match" or exact_match]
    if name not in measured:
        raise InputError(
            f"metric_for_best_model: {config.metric_for_best_model!r} is not measured; there are "
            + ", ".join(f"eval_{k}" for k in measured)
        )


def check_evaluation(config: Config, data: FederatedData) -> None:
    """Refuse what needs an evaluation where there is nothing to evaluate on.

    Raises:
        InputError: which key needs it.
    """
    if data.eval:
        return
    for key in ("eval_personal", "load_best_model_at_end", "early_stopping_patience"):
        if getattr(config, key):
            raise InputError(f"{key} {GIVE_ROWS}")


def dropped_line(number: int, why: str) -> str:
    """How many rows are left out and why."""
    return f"{number:,} {'row is' if number == 1 else 'rows are'} dropped: {why}"


def data_warnings(data: FederatedData) -> list[str]:
    """What the user should know of the rows: dropped ones, notes, labels that nobody learns."""
    warnings = [dropped_line(number, why) for why, number in data.dropped.items()]
    warnings += data.notes
    if data.label_names:
        learnt = {row["label"] for part in data.clients for row in part.train}
        unseen = [name for i, name in enumerate(data.label_names) if i not in learnt]
        if unseen:
            warnings.append(f"no client has a row of the label {', '.join(unseen)}")
    return warnings


def check_quorum(config: Config, asked: int) -> None:
    """Refuse a round that waits for more clients than it asks.

    Args:
        config: of the run.
        asked: how many clients a round asks.

    Raises:
        InputError: what to do.
    """
    for key in ("min_clients_per_round", "clients_needed_per_round"):
        number = getattr(config, key)
        if number is not None and number > asked:
            raise InputError(
                f"{key}: {number}, but a round asks {asked} clients; lower it, or raise "
                "clients_per_round"
            )
