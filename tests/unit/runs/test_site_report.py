"""What sites tell the server before the first round, and what they have to agree on."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from fedlora.config.config import Config
from fedlora.errors import InputError
from fedlora.runs.site_report import SiteReport, in_client_order


def report(client: int, **more: object) -> SiteReport:
    """A site's report."""
    plain = SiteReport(client, f"part_{client}.json", 10, 4, (), "base", f"data {client}")
    return replace(plain, **more)


def test_reports_come_in_any_order() -> None:
    reports = [report(client) for client in (2, 0, 1)]
    assert [r.client for r in in_client_order(Config(num_clients=3), reports)] == [0, 1, 2]
    assert [r.client for r in in_client_order(Config(), reports)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("clients", "says"),
    [
        ([], "the sites report the clients none; each of 3"),
        ([0, 1], "the sites report the clients 0, 1; each of 3 clients, counted from 0"),
        ([0, 1, 1], "the sites report the clients 0, 1, 1"),
        ([1, 2, 3], "the sites report the clients 1, 2, 3"),
    ],
)
def test_each_client_has_to_report_once(clients: list[int], says: str) -> None:
    with pytest.raises(InputError, match=says):
        in_client_order(Config(num_clients=3), [report(client) for client in clients])


def test_labels_and_weights_have_to_be_the_same() -> None:
    first = report(0, label_names=("no", "yes"))
    with pytest.raises(
        InputError,
        match=r"client 1 \(part_1.json\) has yes, no, client 0 .* no, yes; give all sites",
    ):
        in_client_order(Config(), [first, report(1, label_names=("yes", "no"))])
    with pytest.raises(
        InputError, match=r"client 1 \(part_1.json\) has none, client 0 \(part_0.json\) no, yes"
    ):
        in_client_order(Config(), [first, report(1)])
    with pytest.raises(
        InputError, match=r"client 1 \(part_1.json\) holds other weights than client 0"
    ):
        in_client_order(Config(), [report(1, base="other"), report(0)])


def test_a_report_can_be_sent_as_json() -> None:
    it = report(3, label_names=("no", "yes"))
    back = json.loads(json.dumps(asdict(it)))
    assert SiteReport(**{**back, "label_names": tuple(back["label_names"])}) == it
