"""Decides how the rows of a run are read: by which template, and with which labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedlora.data.raw_data import RawData
from fedlora.data.rows import Row, check_column, columns_of, is_null, numbered
from fedlora.data.templates import Template, choose_template, classification, label_of
from fedlora.errors import InputError
from fedlora.text import natural

if TYPE_CHECKING:
    from fedlora.config.config import Config


def is_classification(task_type: str, label_column_name: str | None, template: str) -> bool:
    """Whether the configuration says that a classifier is trained, whatever the model is.

    Args:
        task_type: the key `lora_task_type`.
        label_column_name: the key of this name.
        template: the key of this name.
    """
    return task_type == "SEQ_CLS" or label_column_name is not None or template == "classification"


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
    if raw.eval and (absent := template.missing(eval_columns := columns_of(raw.eval))):
        raise InputError(
            f"the evaluation data: template {template.name} needs the column {', '.join(absent)}; "
            f"it has {', '.join(eval_columns)}"
        )
    _check_cells(raw.located(without_column(raw, template)), template, "the training data")
    _check_cells(numbered(raw.eval), template, "the evaluation data")
    return template


def _check_cells(located: list[tuple[str, Row]], template: Template, data_name: str) -> None:
    """Refuse rows without a value that the template needs, and columns of several types.

    Args:
        located: rows with where they stand.
        template: how they are read.
        data_name: of the data, for a message.
    """
    for place, row in located:
        for names in template.columns:
            if all(is_null(row.get(name)) for name in names):
                raise InputError(
                    f"{data_name}: {place} has no {' or '.join(names)}: {str(dict(row))[:80]}"
                )
    for name in [*(name for names in template.columns for name in names), *template.optional]:
        check_column(located, name, data_name)


def without_column(raw: RawData, template: Template) -> dict[int, str]:
    """Clients whose own file lacks a column that the template needs, and why they are left out.

    A row without the column among rows that have it is a mistake in the file, and refused. A file
    in which no row has it is a client that cannot take part, like one whose rows are all too long.
    """
    if raw.numbers is not None:
        return {}
    reasons = {}
    for client, rows in enumerate(raw.clients):
        for names in template.columns:
            if rows and all(is_null(row.get(name)) for row in rows for name in names):
                reasons[client] = f"it has no {' or '.join(names)}"
    return reasons


def find_labels(raw: RawData, template: Template, label_names: Sequence[str] | None) -> list[str]:
    """All labels: in natural order, or in the order of `label_names`.

    Args:
        raw: the rows of all clients and of the evaluation.
        template: of a classifier.
        label_names: the labels that may occur; None: those of the rows.

    Raises:
        InputError: only one value, one for almost every row, or one that `label_names` lacks.
    """
    column = template.columns[-1][0]
    located = raw.located(without_column(raw, template))
    trained = Counter(label_of(row, column) for _, row in located)
    labels = {*trained, *(label_of(row, column) for row in raw.eval)}
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
    if label_names is None:
        return sorted(labels, key=natural)
    if unknown := sorted(labels - set(label_names)):
        raise InputError(
            f"label_names: the data has labels that are not among them: {', '.join(unknown)}"
        )
    return list(label_names)
