"""No configuration, from Python, a file or the command line, ends in anything but an InputError."""

from __future__ import annotations

import contextlib
import io
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from fedlora.commands.cli import main
from fedlora.config.clients import (
    check_overrides,
    client_ranks,
    settled_overrides,
    with_overrides_read,
)
from fedlora.config.config import CLIENT_KEYS, Config
from fedlora.config.sources import layered, parse_overrides
from fedlora.config.yaml_file import read_yaml
from fedlora.errors import InputError
from fedlora.methods import METHODS, rule_keys

KEYS = [*Config.model_fields, *sorted(rule_keys()), "lora_rank", "", " ", "é", "0", "__class__"]


FEW = settings(
    max_examples=40,
    deadline=None,
    database=None,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)


odd = st.sampled_from(
    [
        *(0, 1, -1, 2, True, False, None, 10**30, -(10**400), 0.0, -0.0, 1e308, 1e-320),
        *(math.nan, math.inf, -math.inf, 1.5, "", " ", "nan", "inf", "-inf", "1e999", "2r", "r"),
        *("0r", "1e3r", "-2r", "..r", "none", "Null", "true", "auto", "all-linear", "(", "*", "[a"),
        *("é", "\ud800", "\x00", "😀" * 50, "0x10", "1_000", "١", "²", "0 r", "9" * 5000, b"bytes"),
        *(
            [],
            {},
            [[]],
            [None],
            [math.nan],
            [True],
            {"a": 1},
            {0: {}},
            {0: None},
            {0: 3},
            {"0": {}},
        ),
        *({-1: {"lora_r": 2}}, {1.5: {}}, {None: {}}, {True: {}}, {0: {"lora_r": {}}}, (1, 2)),
        *({10**30: {"lora_r": 2}}, {"١": {"lora_r": 2}}, {0: {0: 0}}, {0: {None: 1}}, {0: [1]}),
        *METHODS,
    ]
)


scalars = st.one_of(
    odd,
    st.integers(),
    st.floats(),
    st.text(max_size=12),
    st.booleans(),
    st.binary(max_size=3),
    st.dates(),
)


values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.one_of(st.text(max_size=4), st.integers(-2, 5), st.floats()), inner, max_size=3
        ),
    ),
    max_leaves=6,
)


overrides = st.dictionaries(
    st.one_of(st.integers(-1, 4), st.sampled_from(["0", "1", "x", "²", "٣", None, True, 1.0])),
    st.one_of(st.dictionaries(st.sampled_from([*CLIENT_KEYS, *KEYS]), values, max_size=3), values),
    max_size=3,
)


mappings = st.dictionaries(st.sampled_from(KEYS), values, min_size=1, max_size=4)


whole = st.one_of(
    mappings,
    st.builds(lambda some, own: {**some, "client_overrides": own}, mappings, overrides),
    st.builds(lambda own: {"client_overrides": own}, overrides),
    st.builds(
        lambda method, some: {**some, "method": method}, st.sampled_from([*METHODS]), mappings
    ),
)


def used(make: Any) -> None:
    """Make a configuration and ask it everything; only InputError may come."""
    try:
        config = make()
        assert Config(**yaml.safe_load(config.to_yaml())).flat() == config.flat()
        assert config.to_yaml(comments=True)
        config = with_overrides_read(config)
        for client in (0, 1, 7):
            config.of_client(client)
        check_overrides(config, 3)
        settled_overrides(config, client_ranks(config, 3)).flat()
    except InputError:
        return


@seed(0)
@FEW
@given(whole)
def test_keys_from_python(keys: dict[Any, Any]) -> None:
    used(lambda: Config(**{str(key): value for key, value in keys.items()}))


@seed(0)
@FEW
@given(whole)
def test_keys_from_a_file(tmp_path_factory: pytest.TempPathFactory, keys: dict[Any, Any]) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    try:
        path.write_text(
            yaml.dump(keys, allow_unicode=True), encoding="utf-8", errors="surrogatepass"
        )
    except (yaml.YAMLError, ValueError, TypeError):
        return
    used(lambda: Config(**layered(read_yaml(path))))


noise = st.one_of(
    st.text(max_size=60),
    st.text(alphabet="ab0:{}[]-,&*!|>'\"#%@\n \t?~.=<", max_size=60),
)


ODD_FILES = [
    "? [a]: b",
    "{[1]: 2}",
    "{{a: 1}: 2}",
    "? {a: 1}\n: 2",
    "a: &x [*x]",
    "<<: 3",
    "<<: {lora_r: 4}",
    "- 1",
    "lora_r: !!python/object:os.system 3",
    "lora_r: 2020-01-01",
    "lora_r: 99-99-99",
    "seed: 2020-13-45",
    "seed: 190:20:30",
    "!!set {a}",
    "!!binary x",
    "seed: !!int x",
    "seed: !!float abc",
    "seed: !!timestamp x",
    "seed: !!binary é",
    "seed: " + "[" * 1000,
    "seed: " + "9" * 5000,
    "client_overrides: {0: {lora_r: 2}, 0: {lora_r: 3}}",
    "client_overrides: {0: {lora_r: 2}, '0': {lora_r: 3}}",
    "\ufefflora_r: 3",
    "...",
    "---\n---",
    "%YAML 9.9\n---\na: 1",
]


@seed(0)
@FEW
@given(st.one_of(noise, noise.map(lambda x: x.encode("utf-16")), st.binary(max_size=40)))
def test_files_that_are_no_configuration(
    tmp_path_factory: pytest.TempPathFactory, content: str | bytes
) -> None:
    path: Path = tmp_path_factory.getbasetemp() / "noise.yaml"
    raw = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    path.write_bytes(raw)
    used(lambda: Config(**layered(read_yaml(path))))


@pytest.mark.parametrize("content", ODD_FILES, ids=lambda text: repr(text[:20]))
def test_odd_files(tmp_path: Path, content: str) -> None:
    path = tmp_path / "odd.yaml"
    path.write_text(content, encoding="utf-8")
    used(lambda: Config(**layered(read_yaml(path))))


tokens = st.lists(
    st.one_of(
        st.sampled_from([f"--{key}" for key in KEYS]),
        st.sampled_from([f"--{key}=" for key in KEYS]),
        odd.map(str),
        st.text(max_size=8),
        st.integers().map(str),
        st.floats().map(str),
    ),
    max_size=6,
)


@seed(0)
@FEW
@given(tokens)
def test_keys_from_the_command_line(arguments: list[str]) -> None:
    used(lambda: Config(**layered(parse_overrides(arguments))))


@seed(0)
@settings(FEW, max_examples=20)
@given(tokens)
def test_the_command_ends_with_0_or_2(arguments: list[str]) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        assert main(["config", *arguments]) in (0, 2)
