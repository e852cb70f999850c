"""What the server needs whose clients' rows lie elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedlora.config.config import Config
from fedlora.errors import InputError
from fedlora.runs.server_session import assemble_server
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


def test_a_head_that_is_averaged_needs_its_weights(tiny_llama: Path) -> None:
    session = assemble_server(config(tiny_llama), reports(4, 4, labels=("no", "yes")))
    assert session.label_names == ("no", "yes")
    assert session.config.lora_task_type == "SEQ_CLS"
    assert not session.base.full_params["score.weight"].is_meta


@pytest.mark.parametrize(
    ("keys", "ranks", "says"),
    [
        ({"method": "fedit"}, (4, 2), "fedit needs one rank"),
        ({"num_clients": 3}, (4, 2), "the sites report the clients 0, 1; each of 3"),
        ({"clients_per_round": 3}, (4, 2), "clients_per_round: 3, but there are 2 clients"),
        ({"metric_for_best_model": "accuracy"}, (4, 2), "'accuracy' is not measured"),
        ({"client_overrides": {5: {"lora_r": 2}}}, (4, 2), "client 5, but there are 2 clients"),
    ],
)
def test_what_does_not_go_together(
    keys: dict[str, Any], ranks: tuple[int, ...], says: str, tiny_llama: Path
) -> None:
    with pytest.raises(InputError, match=says):
        assemble_server(config(tiny_llama, **keys), reports(*ranks))
