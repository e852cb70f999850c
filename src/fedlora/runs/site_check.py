"""Checks before any run whether a site's rows and model can be used; no weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fedlora.config.site import Site
from fedlora.config.site_run import check_settings
from fedlora.data.site_rows import load_site_rows
from fedlora.runs.absolute_paths import resolve_paths
from fedlora.runs.session import load_base, tokenized


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
    """Read a site's rows as a model would, and the model's shapes.

    Raises:
        InputError: what cannot be used, and what to do.
    """
    config = resolve_paths(check_settings(site))
    allowed = site.bounds.lora_target_modules or ["all-linear"]
    config = config.model_copy(
        update={
            "num_clients": 1,
            "max_length": site.bounds.max_length or config.max_length,
            "lora_target_modules": "all-linear" if "all-linear" in allowed else allowed,
        }
    )
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
        parameters=sum(p.numel() for p in base.model.parameters()),
        modules=len(base.targets.shapes),
        notes=(*notes, *data.notes, *data.taken),
    )
