"""A configuration against the model and the data it is to be run with."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import LlamaConfig, RobertaConfig

from fedlora.config.config import Config
from fedlora.data.datasets import ClientData, FederatedData
from fedlora.data.tokenize import IGNORE
from fedlora.errors import InputError
from fedlora.runs.checks import (
    check_context,
    check_evaluation,
    check_method,
    check_metric,
    check_prompts,
    data_warnings,
    dropped_line,
)


def data(*lengths: int, **more: Any) -> FederatedData:
    """One client with rows of these lengths."""
    rows = [{"input_ids": [5] * n, "labels": [IGNORE, *[5] * (n - 1)]} for n in lengths]
    more = {"clients": (ClientData(rows),), "eval": [], **more}
    return FederatedData(template="text", dropped={}, fingerprint="", **more)


def base(config: Any) -> Any:
    """A model of which only the configuration is there."""
    return SimpleNamespace(model=SimpleNamespace(config=config))


def test_rows_have_to_fit_into_the_context() -> None:
    llama = base(LlamaConfig(max_position_embeddings=8))
    assert check_context(Config(), llama, data(3, 8)) == (8, 8)
    with pytest.raises(InputError, match="a row has 9 tokens, the model's context 8; use max_le"):
        check_context(Config(), llama, data(3, 9))
    endless = base(SimpleNamespace(get_text_config=lambda: SimpleNamespace()))
    assert check_context(Config(), endless, data(3, 900)) == (900, 900)


def test_roberta_counts_positions_from_its_padding_on() -> None:
    roberta = base(RobertaConfig(max_position_embeddings=10, pad_token_id=1))
    assert check_context(Config(), roberta, data(8)) == (8, 8)
    with pytest.raises(InputError, match="context 8"):
        check_context(Config(), roberta, data(9))


def test_what_a_method_cannot_do_with_its_clients() -> None:
    check_method(Config(method="fedit"), [4, 4])
    with pytest.raises(InputError, match="fedit needs one rank"):
        check_method(Config(method="fedit"), [4, 2])
    with pytest.raises(InputError, match="load_best_model_at_end: method fedsa makes a model for"):
        check_method(Config(method="fedsa", load_best_model_at_end=True), [4, 4])
    with pytest.raises(InputError, match="clients_per_round: 3, but there are 2 clients"):
        check_method(Config(clients_per_round=3), [4, 2])
    check_method(Config(clients_per_round=0.9), [4, 2])


def test_the_metric_that_chooses_has_to_be_measured() -> None:
    match = Config(metric_for_best_model="eval_exact_match")
    check_metric(match, "CAUSAL_LM", exact_match=True)
    with pytest.raises(InputError, match="'eval_exact_match' is not measured; there are eval_loss"):
        check_metric(match, "CAUSAL_LM", exact_match=False)
    check_metric(Config(metric_for_best_model="accuracy"), "SEQ_CLS", exact_match=False)
    with pytest.raises(InputError, match="there are eval_loss, eval_accuracy, eval_macro_f1"):
        check_metric(Config(metric_for_best_model="perplexity"), "SEQ_CLS", exact_match=False)


def test_what_needs_an_evaluation_needs_rows() -> None:
    check_evaluation(Config(), data(3))
    for keys in ({"eval_personal": True}, {"early_stopping_patience": 2}):
        with pytest.raises(InputError, match=f"{next(iter(keys))} needs something to evaluate on"):
            check_evaluation(Config(**keys), data(3))
        check_evaluation(Config(**keys), data(3, eval=[{"input_ids": [1]}]))


def test_exact_answers_need_prompts() -> None:
    asked = {"input_ids": [5, 6, 7], "labels": [IGNORE, IGNORE, 7]}
    plain = {"input_ids": [5, 6, 7], "labels": [5, 6, 7]}
    check_prompts(data(3, eval=[asked]))
    with pytest.raises(InputError, match="there are rows without a prompt to answer"):
        check_prompts(data(3, eval=[asked, plain]))


def test_what_is_said_of_the_rows() -> None:
    assert dropped_line(1, "empty") == "1 row is dropped: empty"
    assert dropped_line(1200, "empty") == "1,200 rows are dropped: empty"
    labelled = (ClientData([{"input_ids": [1], "label": 1}]),)
    it = data(clients=labelled, label_names=("no", "yes", "perhaps"), notes=("a note",))
    assert data_warnings(it) == ["a note", "no client has a row of the label no, perhaps"]
