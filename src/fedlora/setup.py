"""From a configuration to everything a run needs: model, data, ranks, resolved settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from fedlora.config import Config
from fedlora.data import FederatedData, load_data
from fedlora.demo import BASE_DIR, EMBEDDED
from fedlora.errors import InputError
from fedlora.evaluate import has_prompts, references_fit
from fedlora.federation import Federation, check_rule
from fedlora.methods import METHODS
from fedlora.model import BaseModel, load_base
from fedlora.seeds import SERVER, Purpose, generator

PATHS = (
    "model_name_or_path",
    "tokenizer_name",
    "dataset_name",
    "train_file",
    "eval_file",
    "init_adapter",
)
AUTOMATIC = (
    "num_threads",
    "use_cpu",
    "num_clients",
    "client_ranks",
    "template",
    "dtype",
    "eval_exact_match",
    "greater_is_better",
)
"""Keys whose automatic value is decided once, written to `config.yaml` and kept on resume."""

EVALUATED = ("loss", "perplexity", "token_accuracy", "exact_match")


@dataclass(frozen=True)
class Session:
    """A run's ingredients.

    Args:
        config: resolved: every automatic choice is made and written in it.
        base: the frozen base with adapter layers.
        data: all clients' data.
        federation: who takes part.
        warnings: what the user should know before it starts.
    """

    config: Config
    base: BaseModel
    data: FederatedData
    federation: Federation
    warnings: tuple[str, ...]

    @property
    def fingerprints(self) -> dict[str, str]:
        """Of the base weights and of all tokens, to recognise others on resume."""
        return {"base": self.base.fingerprint, "data": self.data.fingerprint}


def client_ranks(config: Config, num_clients: int) -> list[int]:
    """The rank of every client: given, one for all, or drawn from `rank_choices`.

    Raises:
        InputError: a list of another length than there are clients.
    """
    given = config.client_ranks
    if isinstance(given, list):
        if len(given) != num_clients:
            raise InputError(
                f"client_ranks: {len(given)} ranks for {num_clients} clients; give one for each"
            )
        return list(given)
    if config.rank_choices:
        shares = config.rank_shares or [1.0] * len(config.rank_choices)
        rng = generator(config.seed, 0, SERVER, Purpose.RANKS)
        drawn = rng.choice(
            config.rank_choices, size=num_clients, p=[s / sum(shares) for s in shares]
        )
        return [int(rank) for rank in drawn]
    return [given or config.lora_r] * num_clients


def assemble(config: Config) -> Session:
    """Load and check everything; nothing is written.

    Raises:
        InputError: what cannot be used, and what to do.
    """
    if not config.model_name_or_path:
        raise InputError(
            "model_name_or_path: name the base model, a hub name or a directory (embedded: the "
            "tiny model of this package)"
        )
    config = resolve_paths(config)
    threads = config.num_threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    embedded = config.model_name_or_path == EMBEDDED
    base = load_base(
        str(BASE_DIR) if embedded else str(config.model_name_or_path),
        target_modules=config.lora_target_modules,
        dtype=config.dtype,
        tokenizer_name=config.tokenizer_name,
        revision=config.model_revision,
        trust_remote_code=config.trust_remote_code,
        use_cpu=bool(config.use_cpu),
    )
    data = load_data(config, base.tokenizer)
    number = len(data.clients)
    ranks = client_ranks(config, number)
    check_rule(METHODS[config.method], ranks)
    if isinstance(config.clients_per_round, int) and config.clients_per_round > number:
        raise InputError(
            f"clients_per_round: {config.clients_per_round}, but there are {number} clients"
        )
    warnings = []
    if data.dropped:
        warnings.append(
            f"{data.dropped} rows are dropped: cut to max_length {config.max_length}, they have no "
            "token left to learn from"
        )
    for client, part in enumerate(data.clients):
        if not part.train:
            warnings.append(f"client {client} has no rows and takes no part")
    held_out = [*data.eval, *(row for part in data.clients for row in part.eval)]
    rows = [*held_out, *(row for part in data.clients for row in part.train)]
    longest = max(len(row["input_ids"]) for row in rows)
    context = getattr(base.model.config, "max_position_embeddings", None) or longest
    if longest > context:
        raise InputError(
            f"max_length: {config.max_length}: a row has {longest} tokens, the model's context "
            f"{context}; use max_length {context} or less"
        )
    exact_match = config.eval_exact_match
    if exact_match == "auto":
        fits = longest + config.generation_max_new_tokens <= context
        exact_match = fits and references_fit(data.eval, config.generation_max_new_tokens)
    elif exact_match and not has_prompts(held_out):
        raise InputError(
            "eval_exact_match: true, but there are rows without a prompt to answer; it needs "
            "completion_only_loss: true and a template other than text"
        )
    _check_metric(config, data, exact_match)
    resolved = config.model_copy(
        update={
            "num_threads": threads,
            "use_cpu": base.device.type == "cpu",
            "num_clients": number,
            "client_ranks": ranks,
            "rank_choices": None,
            "rank_shares": None,
            "template": data.template,
            "dtype": str(next(base.model.parameters()).dtype).removeprefix("torch."),
            "eval_exact_match": exact_match,
            "greater_is_better": config.metric_is_better_when_greater,
        }
    )
    federation = Federation(
        ranks=ranks,
        num_examples=[len(part.train) for part in data.clients],
        shapes=base.targets.shapes,
        seed=config.seed,
        clients_per_round=config.clients_per_round,
        client_weights=config.client_weights,
        server_learning_rate=config.server_learning_rate,
        server_momentum=config.server_momentum,
    )
    return Session(resolved, base, data, federation, tuple(warnings))


def _check_metric(config: Config, data: FederatedData, exact_match: bool) -> None:
    name = config.metric_for_best_model.removeprefix("eval_")
    known = EVALUATED if exact_match else EVALUATED[:-1]
    if name not in known:
        raise InputError(
            f"metric_for_best_model: {config.metric_for_best_model!r} is not measured; there are "
            + ", ".join(f"eval_{k}" for k in known)
        )
    if not data.eval and (config.load_best_model_at_end or config.early_stopping_patience):
        key = (
            "load_best_model_at_end" if config.load_best_model_at_end else "early_stopping_patience"
        )
        raise InputError(
            f"{key} needs something to evaluate on: give eval_file, dataset_test_split or "
            "client_eval_fraction"
        )


def resolve_paths(config: Config) -> Config:
    """The configuration with absolute paths, which a resumed run finds from any directory."""
    return config.model_copy(update={key: _absolute(getattr(config, key)) for key in PATHS})


def _absolute(name: str | None) -> str | None:
    """An absolute path; a hub name stays as it is."""
    if name is None or name == EMBEDDED:
        return name
    path = Path(name)
    pattern = bool(set(name) & set("*?["))
    exists = path.exists() or (
        path.parent.is_dir() and (pattern or (len(path.parts) > 1 and path.suffix))
    )
    return str(path.resolve()) if exists else name
