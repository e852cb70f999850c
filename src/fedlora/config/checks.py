"""Checks what a configuration's keys must be together, and limits that no type can express.

Every check raises ValueError with a sentence that begins with the key. They run in the order of
`CHECKS` once each key by itself is known to be possible, and the first to fail is reported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedlora.config.train_function import EXPECTED, is_name
from fedlora.methods import MERGES, METHODS
from fedlora.text import bytes_of, nearest

if TYPE_CHECKING:
    from fedlora.config.config import Config

_LONGEST_NAME = 200  # of a site, as messages have it


def check_method(config: Config) -> None:
    """The aggregation rule has to exist."""
    if config.method in MERGES:
        raise ValueError(
            f"method: {config.method!r} merges adapters on disk (`fedlora aggregate`) and is no "
            f"rule of a federation's rounds; of these there are {', '.join(METHODS)}"
        )
    if config.method not in METHODS:
        raise ValueError(
            f"method: {config.method!r} is none of {', '.join(METHODS)}"
            + nearest(config.method, METHODS, "")
        )


def check_alpha(config: Config) -> None:
    """LoRA's scale has to be positive, whether it is a number or a multiple of the rank."""
    if config.alpha(1) <= 0:
        raise ValueError(f"lora_alpha: {config.lora_alpha} must be greater than 0")


def check_precision(config: Config) -> None:
    """The base is held in one precision."""
    if config.load_in_8bit and config.load_in_4bit:
        raise ValueError("load_in_8bit and load_in_4bit exclude each other; give one of them")


def check_one_data_source(config: Config) -> None:
    """The training data come from one place."""
    if config.train_file and config.dataset_name:
        raise ValueError("train_file and dataset_name exclude each other; give one of them")


def check_ranks(config: Config) -> None:
    """Ranks are at least 1, and either given or drawn."""
    for key, value in (
        ("client_ranks", config.client_ranks),
        ("rank_choices", config.rank_choices),
    ):
        ranks = value if isinstance(value, list) else [value] if isinstance(value, int) else []
        for rank in ranks:
            if rank < 1:
                raise ValueError(f"{key}: {rank} must be at least 1")
        if value == []:
            raise ValueError(f"{key}: the list is empty")
    if config.rank_choices and config.client_ranks:
        raise ValueError("client_ranks and rank_choices exclude each other; give one of them")


def check_client_memory(config: Config) -> None:
    """Sizes of memory can be read, and automatic ranks have some to fit."""
    memory = config.client_memory
    for text in memory if isinstance(memory, list) else [memory] if memory else []:
        try:
            bytes_of(text)
        except ValueError as error:
            raise ValueError(f"client_memory: {error}") from None
    if memory == []:
        raise ValueError("client_memory: the list is empty")
    if config.client_ranks == "auto" and memory is None:
        raise ValueError(
            "client_ranks: auto fits ranks into memory; say how much each client has, such as "
            "client_memory: [6GB, 12GB]"
        )
    if config.client_ranks == "auto" and config.trains_at_sites:
        raise ValueError(
            "client_ranks: auto looks at the rows, which lie at the sites; plan with "
            "`fedlora plan`, and give each site its rank"
        )
    if config.client_ranks == "auto" and config.engine == "flower":
        raise ValueError(
            "client_ranks: auto is not decided with engine: flower; `fedlora plan --engine local` "
            "tells the ranks that fit; give them as a list, such as client_ranks: [8, 4]"
        )


def check_rank_shares(config: Config) -> None:
    """Every rank to draw from has a share, and some share is positive."""
    shares, choices = config.rank_shares, config.rank_choices or []
    if shares is None:
        return
    if not choices or len(shares) != len(choices):
        raise ValueError(
            f"rank_shares: {len(shares)} shares for {len(choices)} rank_choices; give one for each"
        )
    if min(shares) < 0 or sum(shares) <= 0:
        raise ValueError(f"rank_shares: {shares} must be positive")


def check_clients_per_round(config: Config) -> None:
    """A fraction is a share of the clients, and a share is at most 1."""
    number = config.clients_per_round
    if isinstance(number, float) and number > 1:
        raise ValueError(
            f"clients_per_round: {number} is no share; give a whole number of "
            "clients, or a share of at most 1.0"
        )


def check_round_under_failure(config: Config) -> None:
    """A round waits for no more clients than it asks, and only workers can be stopped."""
    least, asked = config.min_clients_per_round, config.clients_per_round
    needed = config.clients_needed_per_round
    for key, number in (("min_clients_per_round", least), ("clients_needed_per_round", needed)):
        if number is not None and isinstance(asked, int) and number > asked:
            raise ValueError(f"{key}: {number} are more than clients_per_round {asked} asks")
    if least is not None and needed is not None and least > needed:
        raise ValueError(
            f"min_clients_per_round: {least} are more than clients_needed_per_round {needed}, with "
            "which a round closes"
        )
    if config.round_timeout is not None and config.engine == "local":
        raise ValueError(
            "round_timeout belongs to another engine than local; clients that train in this "
            "process cannot be stopped"
        )


def check_sites(config: Config) -> None:
    """Sites have names and addresses of their own, and belong to the engine that asks them."""
    sites = config.sites
    if config.engine != "sites":
        if sites is not None:
            raise ValueError(f"sites belong to engine: sites, not to engine: {config.engine}")
        return
    if not sites:
        raise ValueError(
            "sites: engine: sites needs them, name: path of its worker's socket for each"
        )
    for name, address in sites.items():
        if not 0 < len(name) <= _LONGEST_NAME or not name.isprintable() or not name.strip():
            raise ValueError(f"sites: {name[:40]!r} is no name")
        if not address.strip():
            raise ValueError(f"sites: {name} has no address")
    if len(set(sites.values())) < len(sites):
        raise ValueError("sites: two of them have the same address")


def check_kit(config: Config) -> None:
    """An admin's kit belongs to the engine that submits with it."""
    if config.engine == "nvflare" and not config.kit:
        raise ValueError(
            "kit: engine: nvflare needs it, the directory of your admin's kit in the federation"
        )
    if config.kit is not None and config.engine != "nvflare":
        raise ValueError(f"kit belongs to engine: nvflare, not to engine: {config.engine}")


def check_local_training(config: Config) -> None:
    """A pass trains at least one client, and a round at least one step."""
    if config.cohort_size != "auto" and config.cohort_size < 1:
        raise ValueError(f"cohort_size: {config.cohort_size} must be at least 1")
    if config.num_workers != "auto" and config.num_workers < 1:
        raise ValueError(f"num_workers: {config.num_workers} must be at least 1")
    if config.num_workers != "auto" and config.engine not in ("workers", "flower"):
        raise ValueError(
            f"num_workers belongs to engine: workers; with engine: {config.engine} there are none"
        )
    if config.max_steps == 0:
        raise ValueError("max_steps: 0 trains nothing; give a number, or -1 to count epochs")


def check_partition(config: Config) -> None:
    """What the rows are divided by is named, and shares belong to a division by shares."""
    by_value = ("dirichlet", "column", "labels")
    if config.partition in by_value and not (config.partition_column or config.label_column_name):
        raise ValueError(
            f"partition: {config.partition} needs partition_column, the column to divide by"
        )
    shares = config.partition_shares
    if shares is None:
        return
    if config.partition != "quantity":
        raise ValueError("partition_shares belongs to partition: quantity")
    if not shares or min(shares) <= 0:
        raise ValueError(f"partition_shares: {shares} must be positive")


def check_custom_template(config: Config) -> None:
    """A custom template has a completion, and no other template has texts of its own."""
    if config.template == "custom" and not config.completion_template:
        raise ValueError("template: custom needs completion_template, such as '{answer}'")
    given = config.prompt_template or config.completion_template
    if given and config.template not in ("auto", "custom"):
        raise ValueError(
            "prompt_template and completion_template belong to template: custom, not "
            + config.template
        )
    if config.prompt_template and not config.completion_template:
        raise ValueError("prompt_template needs completion_template beside it")


def check_task(config: Config) -> None:
    """A classifier has labels and texts to classify, a language model has neither."""
    classifies = config.label_column_name is not None or config.template == "classification"
    if classifies and config.lora_task_type == "CAUSAL_LM":
        raise ValueError(
            "lora_task_type: CAUSAL_LM learns no labels; leave label_column_name and template: "
            "classification out, or use SEQ_CLS"
        )
    if config.lora_task_type == "SEQ_CLS" and config.template not in ("auto", "classification"):
        raise ValueError(f"template: {config.template} is no text to classify (SEQ_CLS)")
    if config.text_column_names is not None and len(config.text_column_names) not in (1, 2):
        raise ValueError("text_column_names: give one column, or two for pairs")
    if config.label_names is not None and len(set(config.label_names)) != len(config.label_names):
        raise ValueError("label_names: a name is given twice")


def check_rule_options(config: Config) -> None:
    """The rule has every option that is given, with a possible value."""
    config.rule_options()


def check_train_function(config: Config) -> None:
    """A training of one's own has a name that can be imported, and runs where the rows are."""
    if config.train_function is None:
        return
    if not is_name(config.train_function):
        raise ValueError(f"train_function: {config.train_function!r}: {EXPECTED}")
    if config.trains_at_sites:
        raise ValueError(
            "train_function: sites train by themselves; each names its own training in its own file"
        )


CHECKS = (
    check_method,
    check_alpha,
    check_precision,
    check_one_data_source,
    check_ranks,
    check_client_memory,
    check_rank_shares,
    check_clients_per_round,
    check_round_under_failure,
    check_sites,
    check_kit,
    check_local_training,
    check_partition,
    check_custom_template,
    check_task,
    check_rule_options,
    check_train_function,
)
