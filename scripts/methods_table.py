"""Write the table of docs/methods.md from what the rules declare of themselves.

.venv/bin/python scripts/methods_table.py
"""

from __future__ import annotations

from pathlib import Path

from fedlora.methods import METHODS
from fedlora.methods.rule import Rule

PAGE = Path(__file__).resolve().parent.parent / "docs" / "methods.md"
BEGIN, END = "<!-- table -->\n", "<!-- end of table -->\n"
HEAD = (
    "| `method` | what it does | trained | sent up | sent down | exact when | mixed ranks | secure "
    "sum of |\n" + "|---" * 8 + "|\n"
)
_NAMES = {"AB": "A and B", "A": "A", "B": "B"}


def row(name: str, rule: Rule) -> str:
    """A rule's line of the table."""
    asked = rule.training(rule.options())
    trained = ", then ".join(_NAMES[factors] for factors in asked.trains)
    if asked.tail_penalty:
        trained += ", with a rank penalty"
    sent = ", then ".join(_NAMES[asked.sent(i + 1)] for i in range(len(asked.trains)))
    cells = [
        f"`{name}`",
        rule.title,
        trained,
        sent,
        rule.downlink,
        rule.exact_when,
        "yes" if rule.mixed_ranks else "no",
        rule.secure_sum,
    ]
    return "| " + " | ".join(cells) + " |\n"


def table() -> str:
    """The whole table."""
    return HEAD + "".join(row(name, rule) for name, rule in METHODS.items())


def sources() -> str:
    """A line on where each rule and its options come from."""
    import dataclasses

    lines = []
    for name, rule in METHODS.items():
        keys = [f"`{f.name}` {f.default}" for f in dataclasses.fields(rule.options)]
        options = f"; options {', '.join(keys)}" if keys else ""
        lines.append(f"- `{name}`: {rule.paper}{options}\n")
    return "".join(lines)


def main() -> None:
    """Replace the table in the page."""
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}{table()}\n{sources()}{END}{after}")


if __name__ == "__main__":
    main()
