"""What the server needs whose clients' rows lie elsewhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlora.config.config import Config
from fedlora.errors import InputError
from fedlora.runs.run_header import header
from fedlora.runs.server_session import assemble_server
from fedlora.runs.session import starting_state
from fedlora.runs.site_report import SiteReport


def reports(*ranks: int, labels: tuple[str, ...] = ()) -> list[SiteReport]:
    """A report of each site; client k has 10 + k rows."""
    return [
        SiteReport(k, f"site {k}", 10 + k, rank, labels, "base", f"data {k}")
        for k, rank in enumerate(ranks)
    ]


def config(tiny_llama: Path, **keys: Any) -> Config:
    """Of a server that names no data at all."""
    return Config(model_name_or_path=str(tiny_llama), num_threads=1, **keys)


def test_it_needs_no_row_and_no_memory(tiny_llama: Path) -> None:
    session = assemble_server(config(tiny_llama), reversed(reports(8, 4, 2)))  # type: ignore[arg-type]
    assert list(session.federation.ranks) == [8, 4, 2]
    assert list(session.federation.num_examples) == [10, 11, 12]
    assert all(p.is_meta for p in session.base.model.parameters())
    assert session.config.num_clients == 3
    assert session.label_names == ()


def test_a_head_that_is_averaged_has_the_first_values_of_a_site(tiny_llama: Path) -> None:
    session = assemble_server(config(tiny_llama), reports(4, 4, labels=("no", "yes")))
    assert session.label_names == ("no", "yes")
    assert session.config.lora_task_type == "SEQ_CLS"
    assert session.base.full_params["score.weight"].is_meta
    head = {"score.weight": torch.ones(2, 32)}
    state = starting_state(replace(session, first_values=head))
    assert torch.equal(state.dense["score.weight"], head["score.weight"])


def test_what_sites_have_told_is_what_the_log_says_of_them(tiny_llama: Path) -> None:
    told = [replace(x, tokens=100, eval_rows=3) for x in reports(4, 2)]
    session = replace(assemble_server(config(tiny_llama), told), run="r1")
    line = header(session)
    assert line["run"] == "r1"
    assert line["clients"][1] == {
        "client": 1, "name": "site 1", "rank": 2, "rows": 11, "eval_rows": 3, "tokens": 100,
        "counts": {},
    }  # fmt: skip
    assert not session.evaluates


def test_modules_that_only_a_site_knows_to_be_trained_whole(tiny_llama: Path) -> None:
    """A checkpoint may lack weights; shapes alone do not show it."""
    norm = {"model.norm.weight": (32,)}
    told = [replace(x, full_params=norm) for x in reports(4, 4)]
    session = assemble_server(config(tiny_llama), told)
    assert list(session.base.full_params) == ["model.norm.weight"]


def test_other_target_modules_are_refused(tiny_llama: Path) -> None:
    told = [replace(x, shapes={"q_proj": (2, 2)}) for x in reports(4, 4)]
    with pytest.raises(InputError, match="site site 0 has other target modules"):
        assemble_server(config(tiny_llama), told)


def test_a_server_that_evaluates_has_rows_and_weights(tiny_llama: Path, site_files: Path) -> None:
    rows = {"eval_file": str(site_files / "eval.jsonl"), "eval_exact_match": False}
    bases = {"dtype": "float32", "use_cpu": True}
    with pytest.raises(InputError, match="the server holds other weights than site site 0"):
        assemble_server(config(tiny_llama, **rows, **bases), reports(4, 2))
    without = assemble_server(config(tiny_llama, **rows, server_evaluation=False), reports(4, 2))
    assert not without.evaluates
    assert all(p.is_meta for p in without.base.model.parameters())


@pytest.mark.parametrize(
    ("keys", "ranks", "says"),
    [
        ({"method": "fedit"}, (4, 2), "fedit needs one rank"),
        ({"num_clients": 3}, (4, 2), "the sites report the clients 0, 1; each of 3"),
        ({"clients_per_round": 3}, (4, 2), "clients_per_round: 3, but there are 2 clients"),
        ({"eval_personal": True}, (4, 2), "eval_personal needs rows at the server"),
        ({"early_stopping_patience": 1}, (4, 2), "early_stopping_patience needs something"),
        ({"min_clients_per_round": 3}, (4, 2), "a round asks 2 clients"),
        ({"metric_for_best_model": "accuracy"}, (4, 2), "'accuracy' is not measured"),
        ({"client_overrides": {5: {"lora_r": 2}}}, (4, 2), "client 5, but there are 2 clients"),
    ],
)
def test_what_does_not_go_together(
    keys: dict[str, Any], ranks: tuple[int, ...], says: str, tiny_llama: Path
) -> None:
    with pytest.raises(InputError, match=says):
        assemble_server(config(tiny_llama, **keys), reports(*ranks))
