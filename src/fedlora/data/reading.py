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
    """The template of a run, checked against the training and the evaluation data.

    Args:
        config: of the run.
        raw: its rows.
        classify: the rows are a classifier's.

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
    _check_cells(raw.named_rows(without_column(raw, template)), template, "the training data")
    _check_cells(numbered(raw.eval), template, "the evaluation data")
    return template


def _check_cells(named_rows: list[tuple[str, Row]], template: Template, data_name: str) -> None:
    """Refuse rows without a value that the template needs, and columns of several types.

    Args:
        named_rows: `(name, row)`; a message calls the row by this name.
        template: how they are read.
        data_name: what all rows together are called in a message.
    """
    for row_name, row in named_rows:
        for names in template.columns:
            if all(is_null(row.get(name)) for name in names):
                raise InputError(
                    f"{data_name}: {row_name} has no {' or '.join(names)}: {str(dict(row))[:80]}"
                )
    for name in [*(name for names in template.columns for name in names), *template.optional]:
        check_column(named_rows, name, data_name)


def without_column(raw: RawData, template: Template) -> dict[int, str]:
    """Clients whose own file lacks a column that the template needs, and why they are left out.

    If some rows of a file have the column and others lack it, this is a mistake in the file, and
    it is refused elsewhere. If no row has it, the client cannot take part, like one whose rows are
    all too long.

    Returns:
        Client -> why it is left out; empty where one data set was divided.
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
    """The labels of a classifier, in the order of their ids.

    Args:
        raw: the rows of all clients and of the evaluation.
        template: of a classifier.
        label_names: the labels that may occur, in order; None: those of the rows, in natural order.

    Raises:
        InputError: the rows have one label only, or one for almost every row, or one that is not
            among `label_names`.
    """
    column = template.columns[-1][0]
    rows = raw.named_rows(without_column(raw, template))
    trained = Counter(label_of(row, column) for _, row in rows)
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
