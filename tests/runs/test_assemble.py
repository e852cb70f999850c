"""Server and sites assembled apart from each other: each has what it needs, and nothing more."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

import fedlora
from fedlora.adapters.saved_adapter import write_adapter
from fedlora.client.worker import Worker
from fedlora.errors import InputError
from fedlora.federation.aggregators.mean import Mean
from fedlora.federation.exchange import global_delta
from fedlora.federation.server import Server
from fedlora.methods import METHODS
from fedlora.runs.server_session import ServerSession, assemble_server
from fedlora.runs.session import assemble, starting_state
from fedlora.runs.site_report import SiteReport
from fedlora.runs.site_session import SiteSession, assemble_site
from support.rows import rows, write_jsonl

pytestmark = pytest.mark.usefixtures("kept_bases")


RANKS = [8, 4, 2, 2]
LABELLED = {"label_column_name": "kind", "text_column_names": ["prompt"]}


@pytest.fixture
def keys(small_run: dict[str, Any]) -> dict[str, Any]:
    """A run of one round without a common evaluation, its clients training one after the other."""
    own = {k: v for k, v in small_run.items() if k != "eval_file"}
    return {**own, "num_rounds": 1, "dtype": "float32", "cohort_size": 1}


def at_its_site(keys: dict[str, Any], site_files: Path, site: Path, client: int) -> SiteSession:
    """The site of a client, assembled where there is no file but its own."""
    site.mkdir()
    shutil.copy(site_files / f"site_{client}.jsonl", site)
    return assemble_site(
        fedlora.Config(**{**keys, "train_file": str(site / "site_*.jsonl")}), client
    )


def report(client: int, **changed: Any) -> SiteReport:
    """What a site tells that nobody has assembled."""
    plain = SiteReport(client, "", 10, RANKS[client], (), "weights", f"rows {client}")
    return replace(plain, **changed)


def one_round(server_session: ServerSession, sites: list[SiteSession]) -> Server:
    """A round done by hand: plan, train at every site, accept, commit."""
    first = sites[0].base.read_full_params()
    initial = starting_state(replace(server_session, first_values=first))
    server = Server(server_session.federation, initial, Mean())
    for client, broadcast in server.plan().items():
        site = sites[client]
        worker = Worker(site.base, {client: site.data}, site.config, site.agreement)
        assert server.accept(worker.handle(broadcast)) == ""
    server.commit()
    return server


def without_files(keys: dict[str, Any], nowhere: Path) -> dict[str, Any]:
    """The configuration as the server has it: the data it names does not exist there."""
    return {**keys, "train_file": str(nowhere / "site_*.jsonl")}


def adapters_apart(
    keys: dict[str, Any], site_files: Path, tmp_path: Path
) -> tuple[ServerSession, bytes]:
    """One round of a server and of sites that share no file, and the bytes of its adapter."""
    sites = [at_its_site(keys, site_files, tmp_path / f"at-{k}", k) for k in range(4)]
    told = [SiteReport(**asdict(site.report)) for site in reversed(sites)]
    session = assemble_server(fedlora.Config(**without_files(keys, tmp_path / "nowhere")), told)
    server = one_round(session, sites)
    write_adapter(
        tmp_path / "apart", global_delta(server.state), session.base.targets, server.state.dense
    )
    return session, (tmp_path / "apart" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("method", ["exact", "fedsvd", "hetlora"])
def test_a_round_of_server_and_sites_apart_gives_the_bytes_of_a_run(
    method: str, keys: dict[str, Any], site_files: Path, tmp_path: Path
) -> None:
    keys = {**keys, "method": method}
    if not METHODS[method].mixed_ranks:
        keys["client_ranks"] = [4, 4, 4, 4]
    session, apart = adapters_apart(keys, site_files, tmp_path)
    assert session.federation.num_examples == [24, 16, 12, 8]
    assert next(session.base.model.parameters()).is_meta, "the server has shapes alone"
    whole = fedlora.run(fedlora.Config(**keys))
    assert apart == (whole.final_dir / "adapter_model.safetensors").read_bytes()


def labelled(directory: Path) -> Path:
    """A file per client; the last client has one label alone."""
    directory.mkdir()
    for client, labels in enumerate((("a", "b"), ("b", "c"), ("a", "c"), ("b",))):
        table = [
            {"text": row["prompt"], "label": labels[i % len(labels)]}
            for i, row in enumerate(rows(8, 8 * client))
        ]
        write_jsonl(directory / f"site_{client}.jsonl", table)
    return directory


def test_classifiers_whose_sites_know_some_labels_alone(
    keys: dict[str, Any], tmp_path: Path
) -> None:
    files = labelled(tmp_path / "labelled")
    keys = {
        **keys,
        "train_file": str(files / "site_*.jsonl"),
        "label_column_name": "label",
        "label_names": ["a", "b", "c"],
    }
    session, apart = adapters_apart(keys, files, tmp_path)
    assert session.label_names == ("a", "b", "c")
    assert session.base.full_params, "the head's first values are a site's"
    whole = fedlora.run(fedlora.Config(**keys))
    assert apart == (whole.final_dir / "adapter_model.safetensors").read_bytes()


def test_held_out_rows_are_those_of_a_run(
    keys: dict[str, Any], site_files: Path, tmp_path: Path
) -> None:
    keys = {**keys, "client_eval_fraction": 0.25, "max_train_samples": 10}
    site = at_its_site(keys, site_files, tmp_path / "at-2", 2)
    whole = assemble(fedlora.Config(**keys))
    assert site.data == whole.data.clients[2]
    assert (site.report.name, site.report.num_examples) == ("site_2.jsonl", len(site.data.train))
    assert site.report.base == whole.base.fingerprint
    assert not site.warnings


def test_a_site_names_its_own_file(keys: dict[str, Any], site_files: Path, tmp_path: Path) -> None:
    own = tmp_path / "mine.jsonl"
    shutil.copy(site_files / "site_3.jsonl", own)
    site = assemble_site(fedlora.Config(**{**keys, "train_file": str(own)}), 3)
    assert (site.report.name, site.report.rank, len(site.data.train)) == ("mine.jsonl", 2, 8)


def test_a_server_reads_no_data(keys: dict[str, Any], tmp_path: Path) -> None:
    told = [report(k) for k in range(4)]
    config = fedlora.Config(
        **{
            **without_files(keys, tmp_path / "nowhere"),
            "eval_file": str(tmp_path / "no.jsonl"),
            "server_evaluation": False,
        }
    )
    session = assemble_server(config, told)
    assert (session.federation.ranks, session.config.num_clients) == (RANKS, 4)
    assert session.config.lora_task_type == "CAUSAL_LM"
    json.dumps([asdict(one) for one in session.sites])


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ([], "the sites report the clients none; each of 0 clients"),
        ([report(0), report(0)], "the sites report the clients 0, 0; each of 2 clients"),
        ([report(0), report(2)], "the sites report the clients 0, 2; each of 2 clients"),
        (
            [report(0, label_names=("a", "b")), report(1, label_names=("b", "a"))],
            "label_names: client 1 has b, a, client 0 a, b; give all sites the same",
        ),
        ([report(0), report(1, base="x")], "client 1 holds other weights than client 0"),
    ],
)
def test_sites_that_cannot_train_together(
    told: list[SiteReport], said: str, keys: dict[str, Any]
) -> None:
    with pytest.raises(InputError) as raised:
        assemble_server(fedlora.Config(**{**keys, "client_ranks": None}), told)
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("changed", "client", "said"),
    [
        ({}, 4, "client 4, but there are 4 clients, counted from 0"),
        ({"train_file": "{}/site_[01].jsonl"}, 0, "matches 2 files; at a site it has to match"),
        ({"train_file": "{}/none_*.jsonl"}, 0, "matches no files; at a site it has to match"),
        ({"train_file": "{}/none.jsonl"}, 0, "train_file: "),
        ({"train_file": None}, 0, "no data: give the site's own rows"),
        ({"partition": "quantity"}, 0, "partition: quantity divides one data set"),
        ({"eval_fraction": 0.1}, 0, "eval_fraction divides one data set"),
        ({"client_ranks": None, "rank_choices": [2, 4]}, 0, "rank_choices: ranks are drawn"),
        ({**LABELLED}, 0, "label_names: a site knows the labels of its own rows"),
        (
            {**LABELLED, "label_names": ["s", "r"]},
            0,
            "label_names: the data has labels that are not among them: a, c, f, l",
        ),
    ],
)
def test_a_site_that_cannot_be_assembled(
    changed: dict[str, Any], client: int, said: str, keys: dict[str, Any], site_files: Path
) -> None:
    changed = {
        k: v.format(site_files) if k == "train_file" and v else v for k, v in changed.items()
    }
    with pytest.raises(InputError) as raised:
        assemble_site(fedlora.Config(**{**keys, **changed}), client)
    assert said in str(raised.value)
