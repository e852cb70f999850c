"""Makes what the server of a federation needs whose clients' rows lie elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedlora.config.clients import check_overrides, settled_overrides
from fedlora.config.config import Config
from fedlora.federation.participants import Federation
from fedlora.model.base import BaseModel
from fedlora.model.sources import load_tokenizer
from fedlora.runs.automatic import choose_threads, with_dtype
from fedlora.runs.checks import check_method, check_metric
from fedlora.runs.session import (
    check_init_adapter,
    load_base,
    make_federation,
    model_source,
    resolve_paths,
    task_of,
)
from fedlora.runs.site_report import SiteReport, in_client_order
from fedlora.runs.starting import init_notes
from fedlora.runs.tracker_checks import check_trackers


@dataclass(frozen=True)
class ServerSession:
    """What the server of a federation needs whose clients' rows lie elsewhere.

    Args:
        config: resolved, as far as that needs no rows.
        base: shapes and target modules of the base; see `assemble_server`.
        federation: who takes part.
        sites: what the sites have reported, in client order.
        warnings: what the user should know before it starts.
    """

    config: Config
    base: BaseModel
    federation: Federation
    sites: tuple[SiteReport, ...]
    warnings: tuple[str, ...] = ()

    @property
    def label_names(self) -> tuple[str, ...]:
        """A classifier's labels in the order of their ids; empty: a causal model."""
        return self.sites[0].label_names


def assemble_server(config: Config, reports: Sequence[SiteReport]) -> ServerSession:
    """Load and check what the server of a federation needs; it reads no row and no data file.

    Of the base it makes the shapes alone, without memory. Only where parameters are trained whole,
    or the run goes on from `init_adapter`, does it load the weights as well.

    Args:
        config: of the run.
        reports: one of every site, in any order.

    Raises:
        InputError: what cannot be used, or what sites do not agree on.
    """
    config = resolve_paths(config)
    threads = choose_threads(config, look=False)
    torch.set_num_threads(threads.number)
    check_trackers(config)
    check_init_adapter(config)
    sites = in_client_order(config, reports)
    ranks, label_names = [site.rank for site in sites], sites[0].label_names
    check_overrides(config, len(sites))
    check_method(config, ranks)
    task = task_of(label_names)
    check_metric(config, task, exact_match=config.eval_exact_match is not False)
    base, notes = _load_base_of_server(config, label_names)
    federation = make_federation(config, base, ranks, [site.num_examples for site in sites])
    resolved = settled_overrides(config, ranks).model_copy(
        update={
            "num_threads": threads.number,
            "num_clients": len(ranks),
            "lora_task_type": task,
            "label_names": list(label_names) or None,
            "greater_is_better": config.metric_is_better_when_greater,
        }
    )
    warnings = (*notes, *init_notes(config))
    return ServerSession(resolved, base, federation, tuple(sites), warnings)


def _load_base_of_server(config: Config, label_names: Sequence[str]) -> tuple[BaseModel, list[str]]:
    """The base's shapes; its weights too where the server's first state depends on them."""
    source = model_source(config)
    tokenizer = load_tokenizer(
        source, config.tokenizer_name, config.chat_template_path, generates=not label_names
    )
    base, notes = load_base(source, tokenizer, config, label_names, weights=False)
    if base.full_params or config.init_adapter:
        config, _ = with_dtype(config.model_copy(update={"use_cpu": True}), source)
        base, notes = load_base(source, tokenizer, config, label_names)
    return base, notes
