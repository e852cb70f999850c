"""What is a client's own: ranks, target modules, settings."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import fedlora
from conftest import load_base
from fedlora import Config
from fedlora.client.trainer import Budget
from fedlora.commands.cli import main
from fedlora.config.clients import (
    check_overrides,
    client_modules,
    client_ranks,
    settled_overrides,
    with_overrides_read,
)
from fedlora.config.config import CLIENT_KEYS
from fedlora.config.sources import read_yaml
from fedlora.errors import InputError
from fedlora.runs.metrics_log import read_metrics
from fedlora.runs.session import assemble, resolve_paths

WEIGHTS = "adapter_model.safetensors"


def with_own(table: Any, **values: Any) -> Config:
    return Config(client_overrides=table, **values)


def refused(table: Any, clients: int = 4, **values: Any) -> str:
    with pytest.raises(InputError) as raised:
        check_overrides(with_own(table, **values), clients)
    return str(raised.value)


# --- how they are written ---


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


# --- what is refused ---


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


# --- ranks ---


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


# --- target modules ---


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


# --- a run ---

OWN: dict[int, dict[str, Any]] = {
    0: {"max_steps": 1, "lora_r": 3},
    1: {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "lora_alpha": "1r"},
    2: {"max_train_samples": 5, "learning_rate": 1e-3, "lora_dropout": 0.5},
    3: {"max_steps": -1, "num_train_epochs": 2, "lora_target_modules": ["q_proj", "v_proj"]},
}


@pytest.fixture
def keys(small_run: dict[str, Any]) -> dict[str, Any]:
    """One rank for all, no generation."""
    return {**small_run, "client_ranks": None, "lora_r": 2, "eval_exact_match": False}


@pytest.fixture
def own_files(tmp_path: Path) -> Path:
    """A file for each client."""
    path = tmp_path / "clients"
    path.mkdir()
    for client, own in OWN.items():
        (path / f"client_{client}.yaml").write_text(yaml.safe_dump(own))
    return path


def lines(result: fedlora.Result) -> list[list[dict[str, Any]]]:
    """Every round's clients, without what depends on the clock."""
    rounds = [line for line in result.metrics if line["event"] == "round"]
    for line in rounds:
        for client in line["clients"]:
            client["metrics"].pop("seconds")
    return [line["clients"] for line in rounds]


def test_every_client_trains_by_its_own_settings(keys: dict[str, Any]) -> None:
    plain = lines(fedlora.run(Config(**{**keys, "output_dir": keys["output_dir"] + "-plain"})))
    own = lines(fedlora.run(Config(**keys, client_overrides=OWN)))
    for clients in own:
        assert [c["rank"] for c in clients] == [3, 2, 2, 2]
        # Three steps, but for those that have their own: one, and two epochs of 8 rows by 4.
        assert [c["metrics"]["steps"] for c in clients] == [1, 3, 3, 4]
        assert [c["num_examples"] for c in clients] == [24, 16, 5, 8]
        assert [c["weight"] for c in clients] == pytest.approx([n / 53 for n in (24, 16, 5, 8)])
    for clients in plain:
        assert [c["rank"] for c in clients] == [2, 2, 2, 2]
        assert [c["metrics"]["steps"] for c in clients] == [3, 3, 3, 3]
        assert [c["num_examples"] for c in clients] == [24, 16, 12, 8]
    # A row of rank r and a module (m, n) is sent as r (m + n) numbers of four bytes.
    attention = {"q": (32, 32), "k": (16, 32), "v": (16, 32), "o": (32, 32)}
    mlp = [(48, 32), (48, 32), (32, 48)]
    sizes = {name: 2 * sum(shape) for name, shape in attention.items()}
    every = sum(sizes.values()) + 2 * sum(m + n for m, n in mlp)
    few = sizes["q"] + sizes["v"]
    wanted = [4 * rank * size for rank, size in ((3, every), (2, every), (2, every), (2, few))]
    assert [c["bytes_up"] for c in own[0]] == wanted
    assert [c["bytes_up"] for c in plain[0]] == [4 * 2 * every] * 4


def one_round(small_run: dict[str, Any], own: dict[str, Any]) -> tuple[list[Any], bytes]:
    """The clients of the only round, client 1 with settings of its own; and the final adapter."""
    values = {**small_run, "num_rounds": 1, "eval_file": None, "lora_target_modules": ["q_proj"]}
    values["output_dir"] += "".join(f"-{key}" for key in own)
    result = fedlora.run(Config(**values, client_overrides={1: own}))
    return lines(result)[0], (result.final_dir / WEIGHTS).read_bytes()


def test_each_setting_changes_its_client_alone(small_run: dict[str, Any]) -> None:
    plain, weights = one_round(small_run, {})
    for own in (
        {"learning_rate": 1e-4},
        {"lora_alpha": 64},
        {"use_rslora": True},
        {"lora_dropout": 0.5},
        {"per_device_train_batch_size": 2},
        {"gradient_accumulation_steps": 2},
        {"max_train_samples": 5},
        {"max_steps": 1},
        {"weight_decay": 0.5},
        {"proximal_mu": 10.0},
        {"max_grad_norm": 1e-8},
        {"lr_scheduler_type": "cosine"},
        {"warmup_steps": 5},
        {"adam_beta1": 0.1},
        {"adam_beta2": 0.1},
        {"adam_epsilon": 0.1},
    ):
        clients, changed = one_round(small_run, own)
        assert changed != weights, own
        for client in (0, 2, 3):
            assert clients[client]["metrics"] == plain[client]["metrics"], (own, client)
    size = small_run["per_device_train_batch_size"]
    clients, same = one_round(small_run, {"max_steps": 3, "per_device_train_batch_size": size})
    assert same == weights, "a setting that says what the run says changes nothing"
    assert clients == plain


def test_what_a_client_may_spend_reaches_its_training_function(keys: dict[str, Any]) -> None:
    """Every client's budget, as the training sees it."""
    seen: dict[int, Budget] = {}

    def note(model: Any, dataset: Any, budget: Budget) -> dict[str, Any]:
        seen[budget.client] = budget
        return {"rows": len(dataset)}

    own = {
        1: dict.fromkeys(("weight_decay", "adam_beta1", "adam_beta2", "proximal_mu"), 0.25),
        2: {"warmup_steps": 2, "max_grad_norm": 0.5, "lr_scheduler_type": "cosine"},
        3: {"num_train_epochs": 3, "adam_epsilon": 1e-3, "learning_rate": 0.5},
    }
    fedlora.run(Config(**{**keys, "num_rounds": 1}, client_overrides=own), train_function=note)
    assert sorted(seen) == [0, 1, 2, 3]
    for client, budget in seen.items():
        for key in CLIENT_KEYS:
            if hasattr(budget, key):
                wanted = own.get(client, {}).get(key, getattr(Config(**keys), key))
                assert getattr(budget, key) == wanted, (client, key)


def test_the_saved_configuration_reproduces_the_run(
    keys: dict[str, Any], own_files: Path, tmp_path: Path
) -> None:
    pattern = str(own_files / "*.yaml")
    first = fedlora.run(Config(**keys, client_overrides=pattern))
    saved = read_yaml(tmp_path / "out" / "config.yaml")
    assert saved["client_ranks"] == [3, 2, 2, 2]
    assert saved["client_overrides"][0] == {"max_steps": 1}
    shutil.rmtree(own_files)  # they are read once
    again = fedlora.run(Config(**{**saved, "output_dir": str(tmp_path / "again")}))
    assert lines(again) == lines(first)
    weights = [(path / WEIGHTS).read_bytes() for path in (first.final_dir, again.final_dir)]
    assert weights[0] == weights[1]
    table = fedlora.run(
        Config(**{**keys, "client_overrides": OWN, "output_dir": str(tmp_path / "table")})
    )
    assert (table.final_dir / WEIGHTS).read_bytes() == weights[0]


class StoppedError(Exception):
    """Raised by a callback to end a run."""


def stop(result: fedlora.RoundResult) -> None:
    raise StoppedError


Interrupted = Callable[..., Config]


@pytest.fixture
def interrupted(keys: dict[str, Any]) -> Interrupted:
    """Begins a run with these overrides and stops it after its first round."""

    def begin(overrides: Any, **more: Any) -> Config:
        config = Config(**{**keys, **more}, client_overrides=overrides)
        with pytest.raises(StoppedError):
            fedlora.run(config, callbacks=[stop])
        return config

    return begin


def test_resumed_with_the_same_files(
    interrupted: Interrupted, own_files: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    config = interrupted(str(own_files / "*.yaml"))
    resumed = fedlora.run(config, resume=out)
    assert [line["round"] for line in resumed.metrics if line["event"] == "round"] == [1, 2]
    whole = config.model_copy(update={"output_dir": str(tmp_path / "whole")})
    result = fedlora.run(whole)
    assert (result.final_dir / WEIGHTS).read_bytes() == (out / "final" / WEIGHTS).read_bytes()


def test_resumed_with_the_table_that_the_files_make(
    interrupted: Interrupted, own_files: Path, tmp_path: Path
) -> None:
    config = interrupted(str(own_files / "*.yaml"))
    table = config.model_copy(update={"client_overrides": OWN})
    assert fedlora.run(table, resume=tmp_path / "out").metrics[-1]["round"] == 2


def test_resumed_without_the_files(
    interrupted: Interrupted, own_files: Path, tmp_path: Path
) -> None:
    interrupted(str(own_files / "*.yaml"))
    shutil.rmtree(own_files)
    assert main(["run", "--resume", str(tmp_path / "out")]) == 0
    assert read_metrics(tmp_path / "out")[-1]["round"] == 2


@pytest.mark.parametrize(
    ("client", "change", "says"),
    [
        (0, {"max_steps": 1, "lora_r": 4}, "client_ranks: [3, 2, 2, 2] when it began, [4, 2, 2,"),
        (0, {"max_steps": 2, "lora_r": 3}, "client_overrides: {0: {'max_steps': 1}"),
        (2, {}, "client_overrides: "),
        (3, {**OWN[3], "weight_decay": 0.1}, "client_overrides: "),
    ],
)
def test_resumed_with_other_files_is_refused(
    interrupted: Interrupted,
    own_files: Path,
    tmp_path: Path,
    client: int,
    change: dict[str, Any],
    says: str,
) -> None:
    out = tmp_path / "out"
    config = interrupted(str(own_files / "*.yaml"))
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    (own_files / f"client_{client}.yaml").write_text(yaml.safe_dump(change))
    with pytest.raises(InputError) as raised:
        fedlora.run(config, resume=out)
    message = str(raised.value)
    assert "the configuration differs from the one the run began with" in message
    assert says in message
    assert message.count(" when it began, ") == 1
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_resumed_with_one_file_less_is_refused(
    interrupted: Interrupted, own_files: Path, tmp_path: Path
) -> None:
    config = interrupted(str(own_files / "*.yaml"))
    (own_files / "client_3.yaml").unlink()
    with pytest.raises(InputError, match=r"client_overrides: .* when it began, "):
        fedlora.run(config, resume=tmp_path / "out")


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({4: {"max_steps": 1}}, "client_overrides: client 4, but there are 4 clients, counted fro"),
        ({0: {"seed": 1}}, "client_overrides: client 0: seed is not a client's own to set"),
        ({0: {"lora_target_modules": "query"}}, "client 0: lora_target_modules 'query' is not am"),
        ({0: {"lora_r": 4}}, "client 0: lora_r 4, but client_ranks says 8; give the rank in one"),
    ],
)
def test_a_run_is_refused_before_anything_is_written(
    small_run: dict[str, Any], table: dict[int, Any], says: str
) -> None:
    with pytest.raises(InputError) as raised:
        fedlora.run(Config(**small_run, client_overrides=table))
    assert says in str(raised.value)
    assert not Path(small_run["output_dir"]).exists()


def test_one_rank_by_overrides_does_for_fedit(keys: dict[str, Any]) -> None:
    """Rules of one rank see the ranks that clients end up with."""
    table = {client: {"lora_r": 5} for client in range(4)}
    session = assemble(Config(**keys, method="fedit", client_overrides=table), weights=False)
    assert session.federation.ranks == [5, 5, 5, 5]
    del table[2]
    with pytest.raises(InputError, match=r"method: fedit needs one rank .* 5 5 2 5"):
        assemble(Config(**keys, method="fedit", client_overrides=table), weights=False)


def test_a_client_of_few_modules_moves_no_others(keys: dict[str, Any]) -> None:
    """Where every client trains queries alone, nothing else of the model changes."""
    table = {client: {"lora_target_modules": ["q_proj"]} for client in range(4)}
    delta = fedlora.run(Config(**{**keys, "num_rounds": 1}, client_overrides=table)).adapter
    moved = {name for name, x in delta.items() if torch.linalg.norm(x.B @ x.A) > 0}
    assert moved == {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)}
