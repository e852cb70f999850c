"""Builds one HTML file that has the data, the plotting library, the style and the script in it."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import resources
from typing import Any

from fedlora import __version__
from fedlora.commands.report.collect import Collected
from fedlora.commands.run_files import number

DIGITS = 6
"""Significant digits of what is embedded; whole numbers keep all of theirs."""
MOST_VALUES = 60_000
"""Singular values that a page carries."""
SCRIPTS = ("base.js", "plots.js", "sections.js", "page.js")


def rounded(value: Any) -> Any:
    """The same structure with floats cut to `DIGITS` significant digits, and no NaN."""
    if isinstance(value, float):
        plain = number(value)
        return None if plain is None else float(f"{plain:.{DIGITS}g}")
    if isinstance(value, Mapping):
        return {str(k): rounded(x) for k, x in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(x) for x in value]
    return value


def data_of(collected: Collected) -> dict[str, Any]:
    """What the page's script draws."""
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    whole: dict[str, Any] = rounded(asdict(collected))
    layers = [layer for run in whole["runs"] for layer in run["spectrum"]["layers"]]
    for layer in layers:  # of many runs, fewer values of each layer
        layer["values"] = layer["values"][: max(8, MOST_VALUES // len(layers))]
    return {**whole, "made": made, "fedlora": __version__, "digits": DIGITS}


def render(collected: Collected) -> str:
    """The page."""
    parts = {
        "TITLE": html.escape(collected.title),
        "STYLE": _part("page", "page.css"),
        # "<" never stands in a block of data, so nothing in it can end the block.
        "DATA": json.dumps(data_of(collected), separators=(",", ":"), allow_nan=False).replace(
            "<", "\\u003c"
        ),
        "LIBRARY": _part("vendor", "echarts.min.js").replace("</script", "<\\/script"),
        "SCRIPT": "".join(_part("page", name) for name in SCRIPTS),
    }
    page = _part("page", "page.html")
    for name, text in parts.items():
        before, _, after = page.partition(f"<!--{name}-->")
        page = f"{before}{text}{after}" if after else page
    return page


def _part(*names: str) -> str:
    return resources.files("fedlora.commands.report").joinpath(*names).read_text(encoding="utf-8")
