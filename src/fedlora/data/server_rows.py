"""Loads the rows that a server evaluates on, which has none to train on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora.data.datasets import FederatedData, load_data
from fedlora.data.raw_data import RawData
from fedlora.data.row_files import read_rows
from fedlora.data.subsets import drawn
from fedlora.errors import InputError
from fedlora.seeds import SERVER, Purpose

if TYPE_CHECKING:
    from fedlora.config.config import Config


def load_server_rows(config: Config, tokenizer: Any, label_names: Sequence[str]) -> FederatedData:
    """The rows of `eval_file`, tokenised; no client has any.

    As many are drawn as a run in one process would draw (`max_eval_samples`).

    Args:
        config: of the run, with absolute paths.
        tokenizer: of transformers.
        label_names: a classifier's labels in the order of their ids; empty: a causal model.

    Raises:
        InputError: the file cannot be used, with what was found and what to do.
    """
    if config.eval_file is None:
        return FederatedData((), (), config.template, {}, "", tuple(label_names))
    try:
        rows = read_rows(config.eval_file)
        chosen = drawn(len(rows), config.max_eval_samples, config.seed, SERVER, Purpose.EVAL_ROWS)
        # One client with these rows stands for the evaluation while they are read.
        raw = RawData([[rows[i] for i in chosen]], [Path(config.eval_file).name], [], "")
        whole = {"max_train_samples": None, "client_eval_fraction": 0.0, "client_overrides": None}
        data = load_data(
            config.model_copy(update=whole),
            tokenizer,
            raw,
            classify=bool(label_names),
            label_names=label_names,
        )
    except InputError as error:
        raise InputError(f"eval_file: {error}") from None
    return replace(data, clients=(), eval=data.clients[0].train, taken=())
