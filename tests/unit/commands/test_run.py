"""`fedlora run`: what is asked for, and `--dry_run`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from fedlora.commands.run import HELP, verb
from fedlora.config.config import Config
from fedlora.errors import InputError
from fedlora.methods import METHODS


@pytest.fixture
def my_yaml(small_run: dict[str, Any], tmp_path: Path) -> str:
    """A small run's file."""
    path = tmp_path / "my.yaml"
    path.write_text(yaml.safe_dump({**small_run, "eval_exact_match": False}))
    return str(path)


def test_a_plan_as_a_program_reads_it(my_yaml: str, tmp_path: Path) -> None:
    told: list[Any] = []
    assert verb([my_yaml, "--dry_run", "--clients_per_round", "3"], told.append) == 0
    (plan,) = told
    assert plan["architecture"] == "LlamaForCausalLM"
    assert plan["clients_per_round"] == 3
    assert [client["rank"] for client in plan["clients"]] == [8, 4, 2, 2]
    assert all(client["bytes_up"] == 4 * client["parameters"] for client in plan["clients"])
    assert plan["config"]["template"] == "prompt_completion"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--dry_run", "--resume", "out"], "--dry_run checks a run that has not begun"),
        (["--resume", "absent", "--seed", "1"], "--resume absent: nothing to resume; there is no"),
        (["--resume"], "--resume: give the output directory of the run to go on with"),
        (["--num_rounds", "0"], "num_rounds"),
        (["absent.yaml"], "absent.yaml"),
    ],
)
def test_mistakes_are_told_before_anything_runs(arguments: list[str], says: str) -> None:
    with pytest.raises(InputError, match=says):
        verb(arguments)


def test_a_directory_that_holds_a_run_is_refused(my_yaml: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.yaml").write_text(Config().to_yaml())
    with pytest.raises(InputError, match="holds another run; choose another --output_dir, or go"):
        verb([my_yaml, "--dry_run"])


def test_the_help_has_every_method() -> None:
    for name, rule in METHODS.items():
        assert f"  {name:<9} {rule.title}" in HELP
