"""Decides how the rows of a run are read: by which template, and with which labels."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from fedlora.data.raw_data import RawData
from fedlora.data.rows import Row, check_column, columns_of, is_null, numbered
from fedlora.data.templates import Template, choose_template, classification, label_of
from fedlora.errors import InputError
from fedlora.text import natural

if TYPE_CHECKING:
    from fedlora.config.config import Config


def is_classification(config: Config) -> bool:
    """Whether the data and the settings alone say that a classifier is trained."""
    return (
        config.lora_task_type == "SEQ_CLS"
        or config.label_column_name is not None
        or config.template == "classification"
    )


def template_of(config: Config, raw: RawData, classify: bool) -> Template:
    """The template, checked against the columns of the training and the evaluation data.

    Raises:
        InputError: a column is missing, has several types, or is empty in a row.
    """
    columns = columns_of(raw.train)
    if classify:
        template = classification(config.text_column_names, config.label_column_name, columns)
    else:
        template = choose_template(
            config.template,
            columns,
            prompt_template=config.prompt_template,
            completion_template=config.completion_template,
        )
    if raw.eval and (absent := template.missing(there := columns_of(raw.eval))):
        raise InputError(
            f"the evaluation data: template {template.name} needs the column {', '.join(absent)}; "
            f"it has {', '.join(there)}"
        )
    _check_cells(raw.located(without_column(raw, template)), template, "the training data")
    _check_cells(numbered(raw.eval), template, "the evaluation data")
    return template


def _check_cells(located: list[tuple[str, Row]], template: Template, what: str) -> None:
    """Refuse rows without a value that the template needs, and columns of several types.

    Args:
        located: rows with where they stand.
        template: how they are read.
        what: what they are, for a message.
    """
    for place, row in located:
        for names in template.columns:
            if all(is_null(row.get(name)) for name in names):
                raise InputError(
                    f"{what}: {place} has no {' or '.join(names)}: {str(dict(row))[:80]}"
                )
    for name in [*(name for names in template.columns for name in names), *template.optional]:
        check_column(located, name, what)


def without_column(raw: RawData, template: Template) -> dict[int, str]:
    """Clients whose own file holds a column that the template needs in none of its rows, and why.

    One such row among others is a mistake in a file, and refused; a whole file of them is a
    client that cannot take part, as one whose rows are all too long.
    """
    if raw.numbers is not None:
        return {}
    reasons = {}
    for client, rows in enumerate(raw.clients):
        for names in template.columns:
            if rows and all(is_null(row.get(name)) for row in rows for name in names):
                reasons[client] = f"it has no {' or '.join(names)}"
    return reasons


def find_labels(config: Config, raw: RawData, template: Template) -> list[str]:
    """All labels, in natural order, or as `label_names` has them.

    Raises:
        InputError: only one value, one for almost every row, or one that `label_names` lacks.
    """
    column = template.columns[-1][0]
    located = raw.located(without_column(raw, template))
    trained = Counter(label_of(row, column) for _, row in located)
    everything = {*trained, *(label_of(row, column) for row in raw.eval)}
    if len(trained) < 2:
        raise InputError(
            f"label_column_name: {column} has one value ({next(iter(trained))}) in all "
            f"{trained.total()} training rows; a classifier needs two"
        )
    if len(trained) > 100 and len(trained) > trained.total() / 2:
        raise InputError(
            f"label_column_name: {column} has {len(trained)} different values in "
            f"{trained.total()} rows; these are no classes"
        )
    if config.label_names is None:
        return sorted(everything, key=natural)
    if unknown := sorted(everything - set(config.label_names)):
        raise InputError(
            f"label_names: the data has labels that are not among them: {', '.join(unknown)}"
        )
    return list(config.label_names)
