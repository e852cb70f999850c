"""The configuration: layered, typed, written out and read back, and clear about what is wrong."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.config.arguments import parse_overrides
from fedlora.config.config import Config
from fedlora.config.sources import layered
from fedlora.config.yaml_file import read_yaml
from fedlora.embedded import CONFIG
from fedlora.errors import InputError
from fedlora.methods import METHODS


@pytest.mark.parametrize(
    ("tokens", "values"),
    [
        ([], {}),
        (["--lora_r", "8"], {"lora_r": "8"}),
        (["--lora_r=8"], {"lora_r": "8"}),
        (["--lora-r", "8"], {"lora_r": "8"}),
        (["--client_ranks", "4", "4", "2"], {"client_ranks": ["4", "4", "2"]}),
        (["--use_rslora"], {"use_rslora": True}),
        (["--use_rslora", "--lora_r", "8"], {"use_rslora": True, "lora_r": "8"}),
        (["--max_steps", "-1"], {"max_steps": "-1"}),
        (["--num_clients", "none"], {"num_clients": None}),
        (["--num_clients=Null"], {"num_clients": None}),
        (["--train_file="], {"train_file": ""}),
        (["--train_file=a=b.json"], {"train_file": "a=b.json"}),
    ],
)
def test_overrides(tokens: list[str], values: dict[str, Any]) -> None:
    assert parse_overrides(tokens) == values


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["8"], "'8': expected --key value; the configuration file comes first"),
        (["--lora_r", "8", "--lora_r", "8"], "--lora_r is given twice"),
        (["--lora_r=8", "--lora-r=4"], "--lora_r is given twice"),
        (["--=3"], "'--=3': expected --key value"),
    ],
)
def test_bad_overrides(tokens: list[str], message: str) -> None:
    with pytest.raises(InputError) as raised:
        parse_overrides(tokens)
    assert str(raised.value) == message


def test_text_becomes_what_the_key_holds() -> None:
    config = Config(
        **parse_overrides(
            shlex.split(
                "--lora_r 8 --client_ranks 4 4 2 --lora_target_modules q_proj v_proj "
                "--learning_rate 1e-3 --use_rslora --completion_only_loss false --lora_alpha 16 "
                "--num_clients 3 --early_stopping_patience none --start_fraction 0 --max_rank none "
                "--eval_exact_match true"
            )
        )
    )
    assert config.lora_r == 8
    assert config.client_ranks == [4, 4, 2]
    assert config.lora_target_modules == ["q_proj", "v_proj"]
    assert config.learning_rate == 1e-3
    assert config.use_rslora is True
    assert config.completion_only_loss is False
    assert config.lora_alpha == 16.0
    assert config.early_stopping_patience is None
    assert config.eval_exact_match is True
    assert config.rule_options().start_fraction == 0.0
    assert config.rule_options().max_rank is None


@pytest.mark.parametrize("none", ["none", "None", "null"])
def test_none_reaches_the_key(none: str) -> None:
    assert Config(**parse_overrides(["--save_total_limit", none])).save_total_limit is None


@pytest.mark.parametrize(
    ("given", "held"),
    [("1.0", 1.0), (1.0, 1.0), ("5e-1", 0.5), ("0.3", 0.3), ("1", 1), (1, 1), ("12", 12)],
)
def test_a_share_of_the_clients_is_no_number_of_clients(given: Any, held: float) -> None:
    found = Config(**{"clients_per_round": given}).clients_per_round
    assert (found, type(found)) == (held, type(held))


@pytest.mark.parametrize(
    ("given", "rank", "alpha"),
    [
        ("2r", 8, 16.0),
        ("r", 8, 8.0),
        ("0.5r", 8, 4.0),
        ("2 * r", 4, 8.0),
        (32, 8, 32.0),
        ("32", 8, 32.0),
        ("1e1", 8, 10.0),
    ],
)
def test_alpha(given: Any, rank: int, alpha: float) -> None:
    assert Config(**{"lora_alpha": given}).alpha(rank) == alpha


@pytest.mark.parametrize(
    ("metric", "given", "greater"),
    [
        ("eval_loss", None, False),
        ("perplexity", None, False),
        ("eval_token_accuracy", None, True),
        ("exact_match", None, True),
        ("eval_loss", True, True),
    ],
)
def test_which_way_is_better(metric: str, given: bool | None, greater: bool) -> None:
    config = Config(**{"metric_for_best_model": metric, "greater_is_better": given})
    assert config.metric_is_better_when_greater is greater


def test_numbers_that_yaml_takes_for_text(tmp_path: Path) -> None:
    """YAML 1.1 reads 1e-3 as text; everybody writes it."""
    path = tmp_path / "a.yaml"
    path.write_text("learning_rate: 1e-3\nadam_epsilon: 1e-9\nlora_alpha: 1e1\n")
    values = read_yaml(path)
    assert isinstance(values["learning_rate"], str)
    config = Config(**values)
    assert (config.learning_rate, config.adam_epsilon, config.lora_alpha) == (1e-3, 1e-9, 10.0)


def test_an_empty_file_is_no_keys(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("# nothing\n")
    assert read_yaml(tmp_path / "a.yaml") == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("lora_r: [4\nseed: 1\n", ", line 2: broken YAML: "),
        ("a: 1\n\tb: 2\n", ", line 2: broken YAML: "),
        ("lora_r: 4\nseed: 1\nlora_r: 8\n", ", line 3: lora_r is given twice"),
        ("- a\n- b\n", ": expected 'key: value' lines, found a list"),
        ("just text\n", ": expected 'key: value' lines, found a str"),
        (b"\xff\xfe", ": cannot be read as a configuration: 'utf-8' codec"),
    ],
)
def test_files_that_are_no_configuration(
    tmp_path: Path, content: str | bytes, message: str
) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as raised:
        read_yaml(path)
    assert str(raised.value).startswith(f"{path}{message}")
    assert "\n" not in str(raised.value)


def test_files_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent.yaml: no such configuration file$"):
        read_yaml(tmp_path / "absent.yaml")
    with pytest.raises(InputError, match=r"cannot be read as a configuration: Is a directory$"):
        read_yaml(tmp_path)


def test_merge_keys_are_allowed(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("method_options: &o {start_fraction: 1}\nseed: 3\n")
    assert Config(**read_yaml(tmp_path / "a.yaml")).rule_options().start_fraction == 1


def test_later_layers_win() -> None:
    assert layered({"a": 1, "b": 1}, {"b": 2}, {"c": 3}) == {"a": 1, "b": 2, "c": 3}


def test_a_later_source_of_data_replaces_an_earlier_one() -> None:
    assert layered({"dataset_name": "x"}, {"train_file": "y"}) == {"train_file": "y"}
    assert layered({"train_file": "x"}, {"dataset_name": "y"}) == {"dataset_name": "y"}
    both = {"train_file": "x", "dataset_name": "y"}
    assert layered(both) == both  # a mistake, for Config to name


def test_defaults_and_the_embedded_file_are_valid() -> None:
    assert Config(**{}) == Config()
    assert Config(**read_yaml(CONFIG)).model_name_or_path == "embedded"


numbers = st.floats(1e-12, 1e12)


texts = st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S", "Zs"]), min_size=1)


configurations = st.fixed_dictionaries(
    {},
    optional={
        "lora_r": st.integers(1, 2**40),
        "lora_alpha": numbers | st.sampled_from(["2r", "0.25r", "r"]),
        "learning_rate": numbers,
        "adam_epsilon": numbers,
        "client_ranks": st.integers(1, 99) | st.lists(st.integers(1, 99), min_size=1),
        "clients_per_round": st.none() | st.integers(1, 99) | st.floats(0.001, 1),
        "lora_target_modules": st.none() | texts | st.lists(texts, min_size=1),
        "train_file": texts,
        "output_dir": texts,
        "use_rslora": st.booleans(),
        "eval_exact_match": st.booleans() | st.just("auto"),
        "max_steps": st.integers(1, 99) | st.just(-1),
        "save_total_limit": st.none() | st.integers(1, 9),
        "start_fraction": st.floats(0, 1),
        "max_rank": st.none() | st.integers(1, 99),
    },
)


@settings(max_examples=25, deadline=None)  # it fails on a busy machine otherwise
@given(configurations)
def test_written_and_read_back_it_is_the_same(values: dict[str, Any]) -> None:
    config = Config(**values)
    for comments in (False, True):
        assert Config(**yaml.safe_load(config.to_yaml(comments))).flat() == config.flat()
    assert Config(**config.flat()).flat() == config.flat()


@pytest.mark.parametrize("method", METHODS)
def test_every_key_has_its_line_and_says_what_it_does(method: str) -> None:
    config = Config(**{"method": method})
    lines = config.to_yaml(comments=True).splitlines()
    keys = [line.partition(":")[0] for line in lines]
    assert keys == list(config.flat())
    options = [f.name for f in dataclasses.fields(METHODS[method].options)]
    assert keys[len(keys) - len(options) :] == options
    assert "method_options" not in keys
    assert [line for line in lines if not line.partition(" # ")[2].strip()] == []


def test_options_of_the_rule_are_flat_keys() -> None:
    config = Config(**{"method": "exact", "start_fraction": 0.25})
    assert config.method_options == {"start_fraction": 0.25}
    assert config.flat()["start_fraction"] == 0.25
    assert "start_fraction" not in Config(**{"method": "flora"}).flat()


WHOLE = "expected a whole number"
RANKS = "expected a whole number, a list of whole numbers, auto or none"


NAMES = (
    "exact, fedit, zero_pad, hetlora, ffa, rolora, fedsa, flora, florist, flexlora, fedex, fedsvd, "
    "fedmomentum, raflora, lora_fair"
)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"lora_rank": 8}, "lora_rank: unknown configuration key; did you mean lora_r?"),
    ({"metod": "exact"}, "metod: unknown configuration key; did you mean method?"),
    ({"start_fracton": 1}, "start_fracton: unknown configuration key; did you mean start_fraction"),
    ({"zzzz": 1}, "zzzz: unknown configuration key; `fedlora config` lists all keys"),
    ({"method": "flor"}, f"method: 'flor' is none of {NAMES}; did you mean flora?"),
    ({"method": "zzzz"}, f"method: 'zzzz' is none of {NAMES}"),
    ({"method": "flora", "start_fraction": 1}, "start_fraction: method flora has no such option"),
    ({"start_fraction": 1.5}, "start_fraction: 1.5 must lie between 0 and 1"),
    ({"start_fraction": "x"}, "start_fraction: 'x': expected a number"),
    ({"start_fraction": True}, "start_fraction: True: expected a number (a key without a value"),
    ({"start_fraction": float("nan")}, "start_fraction: nan must lie between 0 and 1"),
    ({"max_rank": 0}, "max_rank: 0 must be at least 1"),
    ({"method": "flora", "scaling_factor": 0}, "scaling_factor: 0.0 must be greater than 0"),
    ({"method": "flora", "scaling_factor": "x"}, "scaling_factor: 'x': expected a number"),
    ({"method": "florist", "energy_threshold": 0}, "energy_threshold: 0.0 must be above 0 and at "),
    ({"method": "florist", "energy_threshold": 1.1}, "energy_threshold: 1.1 must be above 0 and"),
    ({"method": "hetlora", "rank_decay": 0}, "rank_decay: 0.0 must be above 0 and at most 1"),
    ({"method": "hetlora", "rank_decay": 1.5}, "rank_decay: 1.5 must be above 0 and at most 1"),
    ({"method": "hetlora", "rank_penalty": -1}, "rank_penalty: -1.0 must be at least 0"),
    (
        {"method": "lora_fair", "correction_penalty": -1},
        "correction_penalty: -1.0 must be at least",
    ),
    ({"rank_decay": 0.5}, "rank_decay: method exact has no such option"),
    ({"max_rank": "1.5"}, "max_rank: '1.5': expected a whole number or none"),
    ({"method_options": 3}, "method_options: 3: expected the rule's keys and values"),
    ({"method_options": "x"}, "method_options: 'x': expected the rule's keys and values"),
    ({"method_options": {"x": 1}}, "x: method exact has no such option; it has start_fraction, s"),
    ({"lora_r": 0}, "lora_r: 0 must be at least 1"),
    ({"lora_r": "many"}, f"lora_r: 'many': {WHOLE}"),
    ({"lora_r": 1.5}, f"lora_r: 1.5: {WHOLE}"),
    ({"lora_r": None}, f"lora_r: None: {WHOLE}"),
    ({"lora_r": [4, 2]}, f"lora_r: [4, 2]: {WHOLE}"),
    ({"num_rounds": 0}, "num_rounds: 0 must be at least 1"),
    ({"num_rounds": True}, f"num_rounds: True: {WHOLE} (a key without a value is true)"),
    ({"num_rounds": False}, f"num_rounds: False: {WHOLE}"),
    ({"seed": True}, f"seed: True: {WHOLE} (a key without a value is true)"),
    ({"num_rounds": ["3", "my.yaml"]}, f"num_rounds: ['3', 'my.yaml']: {WHOLE}"),
    ({"learning_rate": float("nan")}, "learning_rate: nan must be a finite number"),
    ({"learning_rate": "inf"}, "learning_rate: 'inf' must be a finite number"),
    ({"learning_rate": 0}, "learning_rate: 0 must be greater than 0"),
    ({"learning_rate": True}, "learning_rate: True: expected a number (a key without a value is"),
    ({"lora_dropout": 1}, "lora_dropout: 1 must be less than 1"),
    ({"lora_alpha": float("nan")}, "lora_alpha: nan must be a finite number"),
    ({"lora_alpha": "x"}, "lora_alpha: 'x' is neither a number nor a multiple of r (as 2r)"),
    ({"lora_alpha": 0}, "lora_alpha: 0.0 must be greater than 0"),
    ({"client_ranks": "x"}, f"client_ranks: 'x': {RANKS}"),
    ({"client_ranks": ["4", "x"]}, f"client_ranks: ['4', 'x']: {RANKS}"),
    ({"client_ranks": [4, True]}, f"client_ranks: [4, True]: {RANKS}"),
    ({"client_ranks": [4, 0]}, "client_ranks: 0 must be at least 1"),
    ({"client_ranks": 0}, "client_ranks: 0 must be at least 1"),
    ({"client_ranks": []}, "client_ranks: the list is empty"),
    ({"client_ranks": 4, "rank_choices": [4]}, "client_ranks and rank_choices exclude each other"),
    ({"rank_choices": [0]}, "rank_choices: 0 must be at least 1"),
    ({"rank_shares": [1]}, "rank_shares: 1 shares for 0 rank_choices; give one for each"),
    ({"rank_shares": []}, "rank_shares: 0 shares for 0 rank_choices; give one for each"),
    (
        {"rank_choices": [4, 2], "rank_shares": [1]},
        "rank_shares: 1 shares for 2 rank_choices; give",
    ),
    ({"rank_choices": [4, 2], "rank_shares": [2, -1]}, "rank_shares: [2.0, -1.0] must be positive"),
    ({"clients_per_round": 1.5}, "clients_per_round: 1.5 is no share; give a whole number"),
    ({"clients_per_round": "x"}, "clients_per_round: 'x': expected a whole number, a number or no"),
    ({"clients_per_round": 0}, "clients_per_round: 0 must be greater than 0"),
    ({"dtype": "float8"}, "dtype: 'float8': expected auto, float32, bfloat16 or float16"),
    ({"eval_exact_match": "maybe"}, "eval_exact_match: 'maybe': expected auto or true or false"),
    ({"use_rslora": "maybe"}, "use_rslora: 'maybe': expected true or false"),
    ({"output_dir": True}, "output_dir: True: expected text (a key without a value is true)"),
    ({"output_dir": None}, "output_dir: None: expected text"),
    ({"lora_target_modules": [1]}, "lora_target_modules: [1]: expected a list of names, text or n"),
    ({"max_steps": 0}, "max_steps: 0 trains nothing; give a number, or -1 to count epochs"),
    ({"partition": "dirichlet"}, "partition: dirichlet needs partition_column"),
    ({"train_file": "a", "dataset_name": "b"}, "train_file and dataset_name exclude each other"),
]


@pytest.mark.parametrize(("values", "message"), BAD, ids=[str(values) for values, _ in BAD])
def test_what_is_wrong_is_said_in_one_line(values: dict[Any, Any], message: str) -> None:
    with pytest.raises(InputError) as raised:
        Config(**values)
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)
    assert "input should" not in str(raised.value).lower()


def test_several_wrong_keys_are_several_lines() -> None:
    with pytest.raises(InputError) as raised:
        Config(**{"lora_r": "x", "num_rounds": 0, "client_ranks": [None], "seed": True})
    lines = str(raised.value).splitlines()
    assert sorted(line.partition(":")[0] for line in lines) == sorted(
        ["lora_r", "num_rounds", "client_ranks", "seed"]
    )


@pytest.mark.parametrize("key", [k for k in Config.model_fields if k != "method_options"])
def test_no_key_takes_anything(key: str) -> None:
    """Whatever the key: a mapping is refused in words of ours that name the key."""
    with pytest.raises(InputError) as raised:
        Config(**{key: {"a": object}})
    named = "'a' is no client" if key == "client_overrides" else "{'a': "
    assert str(raised.value).startswith(f"{key}: {named}")
    assert ": expected " in str(raised.value)


@pytest.mark.parametrize("none", ["none", "None", "null"])
def test_the_word_none_is_none_in_a_file_too(tmp_path: Path, none: str) -> None:
    (tmp_path / "a.yaml").write_text(f"save_total_limit: {none}\nlora_target_modules: {none}\n")
    config = Config(**read_yaml(tmp_path / "a.yaml"))
    assert config.save_total_limit is None
    assert config.lora_target_modules is None


def test_one_value_is_a_list_of_one() -> None:
    assert Config(**parse_overrides(["--rank_choices", "4"])).rank_choices == [4]


def test_an_unquoted_pattern_is_explained() -> None:
    with pytest.raises(InputError, match=r"train_file: .* has to be quoted"):
        Config(**parse_overrides(["--train_file", "a.jsonl", "b.jsonl"]))


def test_another_method_drops_the_options_it_does_not_have() -> None:
    file = {"method": "exact", "start_fraction": 0.3, "seed": 1}
    assert layered(file, {"method": "flora"}) == {"method": "flora", "seed": 1}
    assert layered(file, {"method": "exact"}) == file
    assert layered(file, {"seed": 2}) == {**file, "seed": 2}
    # What is given together is not dropped: it is a mistake, and Config says so.
    with pytest.raises(InputError, match="start_fraction: method flora has no such option"):
        Config(**layered({}, {"method": "flora", "start_fraction": 0.3}))


def test_from_python_a_mistake_is_one_line() -> None:
    with pytest.raises(InputError, match=r"^num_rounds: 0 must be at least 1$"):
        Config(num_rounds=0)
    assert Config(start_fraction=1.0).rule_options().start_fraction == 1.0
