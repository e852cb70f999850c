"""Writes the file of a site, with the bounds that the federation's file says it grants."""

from __future__ import annotations

from typing import Any

import yaml

from fedlora.config.federation_file import FederationSite

FILL_IN = "FILL IN"
"""Marks what only the site knows."""

_TEXT = """\
# The site {name} of the federation {federation}: for fedlora worker, which ./start starts.
# Relative paths count from the directory of this file. Lines with "{fill_in}" are yours to decide;
# fedlora worker --example shows every key. Check with: fedlora doctor --site site.yaml

name: {name}                       # as the server calls this site; leave it

# --- your rows, which stay here ---
{rows}
# --- the base model, the same at all sites ---
{model}
# --- your machine ---
{machine}
# --- where the client of this folder calls the worker; leave it ---
state_dir: state                   # what a run needs to go on
socket: worker.sock

# --- what the server may set at most: yours to decide, and refused beyond it ---
{bounds}"""

_MODEL = ("model_name_or_path",)
_MACHINE = ("use_cpu", "num_threads")


def site_text(name: str, federation: str, site: FederationSite) -> str:
    """The file of a site.

    Args:
        name: of the site.
        federation: its name.
        site: what the federation's file knows of it.
    """
    known = dict(site.settings)
    rows = _taken(known, ("train_file", "dataset_name")) or (
        f"train_file: rows.jsonl             # {FILL_IN}: JSON, JSONL, CSV or Parquet\n"
    )
    rows += _taken(known, ("eval_file", "client_eval_fraction")) or (
        "client_eval_fraction: 0.1          # share held out to evaluate the global model on\n"
    )
    model = _taken(known, _MODEL) or (
        f"model_name_or_path: PATH_OR_NAME   # {FILL_IN}: a directory or a hub name\n"
    )
    machine = _taken(known, _MACHINE) or (
        f"# use_cpu: true                    # {FILL_IN} or leave it: a GPU if there is one\n"
    )
    machine += _ranks(site)
    rest = _lines(known)
    if rest:
        rows += rest
    return _TEXT.format(
        name=name,
        federation=federation,
        fill_in=FILL_IN,
        rows=rows,
        model=model,
        machine=machine,
        bounds=_bounds(site),
    )


def _taken(known: dict[str, Any], keys: tuple[str, ...]) -> str:
    """Lines of those keys that are known, which are taken out."""
    return _lines({key: known.pop(key) for key in keys if key in known})


def _lines(values: dict[str, Any]) -> str:
    if not values:
        return ""
    text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return text


def _ranks(site: FederationSite) -> str:
    if site.rank:
        return f"rank: {site.rank}                            # of the adapter trained here\n"
    if site.max_rank:
        return f"max_rank: {site.max_rank}                       # no higher rank than this\n"
    return f"# max_rank: 16                     # {FILL_IN} or leave it: no higher rank than this\n"


def _bounds(site: FederationSite) -> str:
    granted = {k: v for k, v in site.bounds.model_dump().items() if v is not None}
    if not granted:
        return (
            f"# bounds:                          # {FILL_IN}: without them a server may set what "
            "it likes\n#   lora_r: 16\n#   max_steps: 500\n#   max_length: 1024\n"
        )
    return _lines({"bounds": granted})
