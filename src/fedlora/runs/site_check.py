"""Checks before any run whether a site's rows and model can be used, and fit in its memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fedlora.client.memory import largest_need, memory_available
from fedlora.config.config import Config
from fedlora.config.site import Site
from fedlora.config.site_run import check_settings, rank_at
from fedlora.config.train_function import load_train_function
from fedlora.data.site_rows import load_site_rows
from fedlora.runs.absolute_paths import resolve_paths
from fedlora.runs.session import load_base, tokenized
from fedlora.runs.site_session import assemble_site


@dataclass(frozen=True)
class SiteCheck:
    """What a site has; counts alone.

    Args:
        rows: in its files.
        train_rows: usable to train on, once those held out are taken off; None: no model is named,
            so it is not known what can be used.
        eval_rows: to evaluate the global model on.
        tokens: of the rows to train on.
        dropped: why rows are left out -> how many.
        labels: of a classifier, in order.
        template: how rows become text.
        architecture: the model's class.
        parameters: of the model.
        modules: target modules that a server could train.
        notes: what the user should know.
    """

    rows: int
    train_rows: int | None = None
    eval_rows: int | None = None
    tokens: int | None = None
    dropped: Mapping[str, int] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    template: str | None = None
    architecture: str | None = None
    parameters: int | None = None
    modules: int | None = None
    notes: tuple[str, ...] = ()


def check_site(site: Site) -> SiteCheck:
    """Read a site's rows as a model would, and the model's shapes; no weight is read.

    Raises:
        InputError: what cannot be used, and what to do.
    """
    config = _largest_run(site)
    raw = load_site_rows(config, 0, 1)
    number = len(raw.clients[0]) + len(raw.eval)
    if config.model_name_or_path is None:
        return SiteCheck(number)
    source, tokenizer, data = tokenized(config, raw)
    base, notes = load_base(source, tokenizer, config, data.label_names, weights=False)
    (client,) = data.clients
    held_out = [*client.eval, *data.eval] if raw.eval else data.eval
    return SiteCheck(
        rows=number,
        train_rows=len(client.train),
        eval_rows=len(held_out),
        tokens=sum(len(row["input_ids"]) for row in client.train),
        dropped=data.dropped,
        labels=data.label_names,
        template=data.template,
        architecture=type(base.model).__name__,
        parameters=base.num_parameters,
        modules=len(base.targets.shapes),
        notes=(*notes, *data.notes, *data.taken),
    )


@dataclass(frozen=True)
class SiteNeed:
    """What the largest run that a site lets a server ask for needs of its machine.

    Args:
        base: fingerprint of the base's weights, which is the same at all sites of a run.
        dtype: that the weights are kept in; another one has another fingerprint.
        rank: of the adapter.
        batch_size: rows of a step.
        memory: bytes that training takes beside the weights.
        available: bytes that are free once the weights are loaded.
    """

    base: str
    dtype: str
    rank: int
    batch_size: int
    memory: int
    available: int


def measure_site(site: Site) -> SiteNeed:
    """Load a site's model, and measure what its rows need at the largest rank that it grants.

    Raises:
        InputError: what cannot be used, and what to do.
    """
    config = _largest_run(site)
    rank = rank_at(site, site.bounds.lora_r or config.lora_r)
    session = assemble_site(config.model_copy(update={"client_ranks": [rank]}), 0)
    size = session.config.per_device_train_batch_size
    assert isinstance(size, int)
    need = largest_need(session.base, [(session.data.train, size, rank)])
    return SiteNeed(
        base=session.base.fingerprint,
        dtype=str(session.config.dtype),
        rank=rank,
        batch_size=size,
        memory=need.nbytes,
        available=memory_available(session.base.device),
    )


def _largest_run(site: Site) -> Config:
    """The configuration of the largest run that a site lets a server ask for."""
    config = resolve_paths(check_settings(site))
    if config.train_function is not None:
        load_train_function(config.train_function)
    allowed = site.bounds.lora_target_modules or ["all-linear"]
    return config.model_copy(
        update={
            "num_clients": 1,
            "max_length": site.bounds.max_length or config.max_length,
            "lora_target_modules": "all-linear" if "all-linear" in allowed else allowed,
        }
    )
