"""What the site of one client needs, which has the rows of no other client."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedlora.config.config import Config
from fedlora.errors import InputError
from fedlora.runs.site_session import assemble_site
from support.rows import write_jsonl


def test_a_site_tells_the_server_what_it_has_to_know(tiny_llama: Path, site_files: Path) -> None:
    config = Config(
        model_name_or_path=str(tiny_llama),
        train_file=str(site_files / "site_1.jsonl"),
        client_ranks=[8, 4, 2],
        num_threads=1,
        dtype="float32",
    )
    session = assemble_site(config, 1)
    report = session.report
    assert (report.client, report.name, report.rank) == (1, "site_1.jsonl", 4)
    assert report.num_examples == len(session.data.train) == 16
    assert report.base == session.base.fingerprint
    assert session.config.cohort_size == 1
    assert session.agreement.shapes == session.base.targets.shapes


@pytest.mark.parametrize(
    ("keys", "client", "says"),
    [
        ({"num_clients": 2}, 2, "client 2, but there are 2 clients, counted from 0"),
        ({"client_ranks": [4]}, 1, "client 1, but there are 1 clients"),
        ({"rank_choices": [2, 4]}, 0, "rank_choices: ranks are drawn for all clients at once"),
        ({"partition": "quantity", "num_clients": 2}, 0, "partition: quantity divides one data"),
        ({"num_clients": 1, "train_file": None}, 0, "no data: give the site's own rows"),
    ],
)
def test_what_a_site_cannot_do(
    keys: dict[str, Any], client: int, says: str, site_files: Path
) -> None:
    given = {"train_file": str(site_files / "site_0.jsonl"), "num_threads": 1, **keys}
    with pytest.raises(InputError, match=says):
        assemble_site(Config(model_name_or_path="embedded", **given), client)


def test_all_labels_of_the_federation_have_to_be_named(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x", "label": "yes"}] * 3)
    keys: dict[str, Any] = {
        "model_name_or_path": "embedded",
        "train_file": str(path),
        "label_column_name": "label",
        "num_clients": 1,
        "num_threads": 1,
    }
    with pytest.raises(InputError, match="a site knows the labels of its own rows alone"):
        assemble_site(Config(**keys), 0)
    with pytest.raises(InputError, match="the data has labels that are not among them: yes"):
        assemble_site(Config(**keys, label_names=["no", "perhaps"]), 0)
