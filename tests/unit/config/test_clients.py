"""What is a client's own: ranks, target modules, settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedlora import Config
from fedlora.config.clients import (
    check_overrides,
    client_modules,
    client_ranks,
    settled_overrides,
    with_overrides_read,
)
from fedlora.config.config import CLIENT_KEYS
from fedlora.config.yaml_file import read_yaml
from fedlora.errors import InputError
from fedlora.runs.absolute_paths import resolve_paths
from fedlora.runs.session import assemble
from support.clients import keys  # noqa: F401
from support.models import load_base


def with_own(table: Any, **values: Any) -> Config:
    return Config(client_overrides=table, **values)


def refused(table: Any, clients: int = 4, **values: Any) -> str:
    with pytest.raises(InputError) as raised:
        check_overrides(with_own(table, **values), clients)
    return str(raised.value)


def test_a_table_of_yaml(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(
        "learning_rate: 1e-3\n"
        "client_overrides:\n"
        "  0: {lora_r: 4, learning_rate: 5e-4}\n"
        "  2:\n"
        "    max_steps: 7\n"
        "    lora_target_modules: [q_proj, v_proj]\n"
    )
    config = Config(**read_yaml(tmp_path / "my.yaml"))
    assert config.of_client(0).learning_rate == 5e-4
    assert config.of_client(0).lora_r == 4
    assert config.of_client(1) == config
    assert config.of_client(1).learning_rate == 1e-3
    assert config.of_client(2).max_steps == 7
    assert config.of_client(2).lora_target_modules == ["q_proj", "v_proj"]
    assert config.of_client(2).learning_rate == 1e-3
    assert config.of_client(99) == config


def test_clients_may_be_text() -> None:
    """JSON has no numbers for keys."""
    config = with_own({"0": {"max_steps": 7}, "11": {"max_steps": 8}})
    assert config == with_own({0: {"max_steps": 7}, 11: {"max_steps": 8}})
    assert (config.of_client(0).max_steps, config.of_client(11).max_steps) == (7, 8)


def test_a_pattern_of_files_in_natural_order(tmp_path: Path) -> None:
    (tmp_path / "clients").mkdir()
    for number in (2, 10, 1, 9):
        (tmp_path / "clients" / f"site_{number}.yaml").write_text(f"max_steps: {number}\n")
    (tmp_path / "clients" / "site_3.yaml").write_text("# nothing of its own\n")
    config = with_own(str(tmp_path / "clients" / "*.yaml"))
    read = with_overrides_read(config)
    assert read.client_overrides == {
        0: {"max_steps": 1},
        1: {"max_steps": 2},
        2: {},
        3: {"max_steps": 9},
        4: {"max_steps": 10},
    }
    assert read.of_client(2) == read
    assert with_overrides_read(read) is read
    assert resolve_paths(config) == resolve_paths(read)


def test_a_pattern_that_cannot_be_read(tmp_path: Path) -> None:
    pattern = str(tmp_path / "*.yaml")
    with pytest.raises(InputError) as raised:
        with_overrides_read(with_own(pattern))
    assert str(raised.value) == f"client_overrides: {pattern}: the pattern matches no file"
    for content, says in (
        ("lora_r: 4\nlora_r: 8\n", "a.yaml, line 2: lora_r is given twice"),
        ("- 4\n", "a.yaml: expected 'key: value' lines, found a list"),
        ("lora_r: [4\n", "a.yaml, line 2: broken YAML"),
    ):
        (tmp_path / "a.yaml").write_text(content)
        with pytest.raises(InputError, match=says):
            with_overrides_read(with_own(pattern))


@pytest.mark.parametrize(
    "table", [[{"lora_r": 4}], {"first": {"lora_r": 4}}, {0: 4}, {0: None}, {0: [{"lora_r": 4}]}, 7]
)
def test_what_is_no_table(table: Any) -> None:
    with pytest.raises(InputError) as raised:
        with_own(table)
    message = str(raised.value)
    assert message.startswith("client_overrides: ")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("key", "near"), [("lerning_rate", "learning_rate"), ("lora_rank", "lora_r"), ("epochs", "")]
)
def test_the_nearest_key_is_named(key: str, near: str) -> None:
    message = refused({1: {key: 1}})
    assert message.startswith(f"client_overrides: client 1: {key} is not a client's own to set; ")
    if near:
        assert message.endswith(f"; did you mean {near}?")
    else:
        assert message.endswith(f"; it may set {', '.join(CLIENT_KEYS)}")


@pytest.mark.parametrize("key", sorted(set(Config.model_fields) - set(CLIENT_KEYS)))
def test_what_all_clients_share_is_refused(key: str) -> None:
    message = refused({2: {key: Config().model_dump()[key]}})
    assert message.startswith(f"client_overrides: client 2: {key} is not a client's own to set")


def test_a_client_holds_the_base_in_one_precision() -> None:
    """Its own goes before that of the federation; without one it holds what all others do."""
    config = with_own({1: {"load_in_4bit": True}, 2: {"load_in_8bit": False}}, load_in_8bit=True)
    own = [config.of_client(k) for k in range(3)]
    assert [x.load_in_8bit for x in own] == [True, False, False]
    assert [x.load_in_4bit for x in own] == [False, True, False]


@pytest.mark.parametrize("key", CLIENT_KEYS)
def test_what_a_client_may_set(key: str) -> None:
    """Every key that is allowed reaches the client's configuration, and no other's."""
    values: dict[str, Any] = {
        "lora_r": 3,
        "lora_alpha": 5.0,
        "use_rslora": True,
        "lora_target_modules": ["q_proj"],
        "lr_scheduler_type": "cosine",
        "max_train_samples": 3,
        "load_in_8bit": True,
        "load_in_4bit": True,
    }
    value = values.get(key, 0.25 if isinstance(getattr(Config(), key), float) else 3)
    config = with_own({1: {key: value}})
    check_overrides(config, 2)
    assert getattr(config.of_client(1), key) == value
    assert getattr(config.of_client(0), key) == getattr(Config(), key) != value
    others = {k: v for k, v in config.of_client(1).flat().items() if k != key}
    assert others == {k: v for k, v in Config().flat().items() if k != key}


@pytest.mark.parametrize(
    ("own", "says"),
    [
        ({"learning_rate": -1}, "learning_rate: -1 must be greater than 0"),
        ({"learning_rate": "fast"}, "learning_rate: 'fast': expected a number"),
        ({"lora_r": 0}, "lora_r: 0 must be at least 1"),
        ({"lora_dropout": 1}, "lora_dropout: 1 must be less than 1"),
        ({"max_steps": 0}, "max_steps: 0 trains nothing; give a number, or -1 to count epochs"),
        ({"lora_alpha": "r2"}, "lora_alpha: 'r2' is neither a number nor a multiple of r (as 2r)"),
        ({"lora_alpha": 0}, "lora_alpha: 0.0 must be greater than 0"),
        ({"use_rslora": 3}, "use_rslora: 3: expected true or false"),
        ({"per_device_train_batch_size": True}, "per_device_train_batch_size: True: expected a wh"),
        ({"lr_scheduler_type": "step"}, "lr_scheduler_type: 'step': expected linear, cosine, "),
    ],
)
def test_an_impossible_value_names_client_and_key(own: dict[str, Any], says: str) -> None:
    assert refused({3: own}).startswith(f"client_overrides: client 3: {says}")


def test_a_client_has_a_number() -> None:
    for client in (-1, "site_b"):
        with pytest.raises(
            InputError, match=f"client_overrides: '?{client}'? is no client: expected a number"
        ):
            Config(client_overrides={client: {"max_steps": 1}})
    with pytest.raises(InputError, match="client_overrides: client 1: 4: expected its keys"):
        Config(client_overrides={1: 4})


@pytest.mark.parametrize("client", [4, 17])
def test_a_client_that_is_not_there(client: int) -> None:
    assert refused({0: {"max_steps": 1}, client: {"max_steps": 1}}) == (
        f"client_overrides: client {client}, but there are 4 clients, counted from 0"
    )


def ranks(clients: int = 4, **values: Any) -> list[int]:
    return client_ranks(Config(**values), clients)


def test_where_ranks_come_from() -> None:
    assert ranks() == [16] * 4
    assert ranks(lora_r=3) == [3] * 4
    assert ranks(lora_r=3, client_ranks=5) == [5] * 4
    assert ranks(client_ranks=[4, 3, 2, 1]) == [4, 3, 2, 1]
    own = {1: {"lora_r": 7}, 3: {"max_steps": 1}}
    assert ranks(client_overrides=own) == [16, 7, 16, 16]
    assert ranks(client_overrides=own, client_ranks=5) == [5, 7, 5, 5]
    assert ranks(client_overrides=own, client_ranks=[4, 7, 2, 1]) == [4, 7, 2, 1]


@pytest.mark.parametrize("rank", ["7", 7.0])
def test_a_rank_as_text_is_a_number(rank: Any) -> None:
    """As everywhere in a configuration."""
    found = ranks(client_overrides={1: {"lora_r": rank}})
    assert found == [16, 7, 16, 16]
    assert [type(value) for value in found] == [int] * 4


def test_drawn_ranks() -> None:
    drawn = ranks(400, rank_choices=[2, 4, 8], rank_shares=[1, 2, 1])
    assert set(drawn) == {2, 4, 8}
    # Shares 1/4, 1/2, 1/4; four standard errors.
    for rank, share in ((2, 0.25), (4, 0.5), (8, 0.25)):
        assert abs(drawn.count(rank) / 400 - share) < 4 * (share * (1 - share) / 400) ** 0.5
    assert ranks(400, rank_choices=[2, 4, 8], rank_shares=[1, 2, 1]) == drawn
    assert ranks(400, rank_choices=[2, 4, 8], rank_shares=[1, 2, 1], seed=1) != drawn
    assert set(ranks(400, rank_choices=[2, 4, 8], rank_shares=[1, 0, 0])) == {2}
    own = ranks(
        400, rank_choices=[2, 4, 8], rank_shares=[1, 2, 1], client_overrides={5: {"lora_r": 99}}
    )
    assert own == [*drawn[:5], 99, *drawn[6:]]


def test_drawn_ranks_are_the_same_on_any_machine() -> None:
    assert ranks(8, rank_choices=[2, 4, 8]) == [8, 8, 2, 2, 2, 4, 8, 2]


def test_a_rank_in_two_places() -> None:
    with pytest.raises(InputError) as raised:
        ranks(client_ranks=[4, 3, 2, 1], client_overrides={2: {"lora_r": 8}})
    assert str(raised.value) == (
        "client_overrides: client 2: lora_r 8, but client_ranks says 2; give the rank in one of "
        "them"
    )
    with pytest.raises(
        InputError, match=r"^client_ranks: 3 ranks for 4 clients; give one for each"
    ):
        ranks(client_ranks=[4, 3, 2])


def test_settled_ranks_stand_in_one_place() -> None:
    own = {0: {"lora_r": 7}, 1: {"lora_r": 3, "max_steps": 1}, 2: {}}
    config = with_own(own, rank_choices=[2, 4], rank_shares=[1, 1])
    settled = settled_overrides(config, [7, 3, 2, 4])
    assert settled.client_ranks == [7, 3, 2, 4]
    assert settled.rank_choices is settled.rank_shares is None
    assert settled.client_overrides == {1: {"max_steps": 1}}
    assert settled_overrides(settled, client_ranks(settled, 4)) == settled
    assert settled_overrides(with_own({0: {"lora_r": 7}}), [7]).client_overrides is None


def modules(tiny_llama: Path, own: Any, run: Any = "all-linear") -> dict[int, frozenset[str]]:
    base = load_base(str(tiny_llama), target_modules=run, weights=False)
    config = with_own({1: {"lora_target_modules": own}}, lora_target_modules=run)
    return client_modules(config, base.targets.shapes)


def test_target_modules_of_a_client(tiny_llama: Path) -> None:
    layers = [f"model.layers.{i}" for i in (0, 1)]
    query = {f"{layer}.self_attn.q_proj" for layer in layers}
    value = {f"{layer}.self_attn.v_proj" for layer in layers}
    assert modules(tiny_llama, ["q_proj"]) == {1: query}
    assert modules(tiny_llama, "q_proj") == {1: query}
    assert modules(tiny_llama, ["q_proj", "v_proj"]) == {1: query | value}
    assert modules(tiny_llama, r".*layers\.1\.self_attn\.(q|v)_proj") == {
        1: {"model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"}
    }
    assert modules(tiny_llama, ["model.layers.0.self_attn.q_proj"]) == {
        1: {"model.layers.0.self_attn.q_proj"}
    }
    assert modules(tiny_llama, "all-linear") == modules(tiny_llama, None) == {}
    assert modules(tiny_llama, "none") == {}
    assert modules(tiny_llama, ["q_proj"], run=["q_proj"]) == {}
    assert modules(tiny_llama, ["q_proj"], run=["q_proj", "v_proj"]) == {1: query}


@pytest.mark.parametrize(
    "own", [["k_proj"], "k_proj", ["q_proj", "k_proj"], ["query"], r".*\.mlp\..*", "(", "proj"]
)
def test_target_modules_that_the_run_does_not_have(tiny_llama: Path, own: Any) -> None:
    with pytest.raises(InputError) as raised:
        modules(tiny_llama, own, run=["q_proj", "v_proj"])
    assert str(raised.value) == (
        f"client_overrides: client 1: lora_target_modules {own!r} is not among the target modules "
        "of the run (q_proj, v_proj)"
    )


def test_one_rank_by_overrides_does_for_fedit(keys: dict[str, Any]) -> None:
    """Rules of one rank see the ranks that clients end up with."""
    table = {client: {"lora_r": 5} for client in range(4)}
    session = assemble(Config(**keys, method="fedit", client_overrides=table), weights=False)
    assert session.federation.ranks == [5, 5, 5, 5]
    del table[2]
    with pytest.raises(InputError, match=r"method: fedit needs one rank .* 5 5 2 5"):
        assemble(Config(**keys, method="fedit", client_overrides=table), weights=False)
